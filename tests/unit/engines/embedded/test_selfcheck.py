"""The self-check finds wrong log-probs and bits that depend on the batch."""

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_model

from slime.engines.embedded.model import ModelRunner
from slime.engines.embedded.selfcheck import check_model, log_prob_difference, probe_invariance
from slime.engines.embedded.shapes import BatchShapes, padded_length
from slime.errors import EngineError


def test_a_forgotten_mask_is_found() -> None:
    runner = ModelRunner(tiny_model("mistral"))
    assert log_prob_difference(runner) < 1e-5
    runner.masks.window = None
    assert log_prob_difference(runner) > 1e-2


def test_weights_that_are_no_numbers_never_pass() -> None:
    model = tiny_model("qwen3")
    model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(EngineError, match="differ by inf"):
        check_model(model, max_running=8)


def test_bits_that_depend_on_the_number_of_rows_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = ModelRunner(tiny_model("qwen3"))
    honest = runner.logits

    def varying(hidden: torch.Tensor) -> torch.Tensor:
        logits = honest(hidden)
        return logits * (1 + 1e-6) if hidden.shape[0] == 16 else logits

    monkeypatch.setattr(runner, "logits", varying)
    agreeing, is_invariant = probe_invariance(runner, BatchShapes((8, 16, 24)), None)
    assert agreeing == {8, 24}
    assert is_invariant is False
    assert BatchShapes((8, 16, 24)).only(agreeing).counts == (8, 24)


def test_without_time_the_answer_is_unknown() -> None:
    runner = ModelRunner(tiny_model("qwen3"))
    _, is_invariant = probe_invariance(runner, BatchShapes.up_to(64), -1.0 + 1e-9)
    assert is_invariant in (None, False)


def test_deterministic_mode_leaves_only_shapes_that_agree() -> None:
    checked = check_model(tiny_model("qwen3"), max_running=24, deterministic=True)
    assert checked.is_invariant
    assert checked.shapes.largest == 24


def test_shapes_round_up() -> None:
    shapes = BatchShapes.up_to(100)
    assert [shapes.rows(n) for n in (1, 8, 9, 64, 65, 97)] == [8, 8, 16, 64, 96, 128]
    assert BatchShapes.up_to(3).counts == (8,)
    assert [padded_length(n) for n in np.array([1, 32, 33])] == [32, 32, 64]
