"""A loss of the user's own, from logits: the same step as the built-in one."""

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from support import user_losses
from support.device import DEVICE
from support.megatron_runs import (
    grouped,
    make_tiny_qwen3,
    random_batch,
    start_trainer,
    trainer_config,
    weights_of,
)

from slime.data.batch import Ragged, RolloutBatch
from slime.errors import DataError
from slime.training.interface import ModelTag
from slime.training.update import UpdateHooks, run_update

pytestmark = pytest.mark.trainer

# On a card packs are padded to a multiple of so many tokens.
PADDING = {"cpu": 1, "cuda": 128}
VOCAB = 106  # no multiple of 8: the embedding is padded
HERE = "support.user_losses."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), vocab_size=VOCAB)


def batch(seed: int) -> RolloutBatch:
    """Some samples share their prompt: a pack of log-probs would compute it once."""
    return grouped(random_batch(num_samples=6, vocab_size=VOCAB, seed=seed), 3)


def updated(model: str, *words: str, hooks: UpdateHooks | None = None) -> tuple[Any, Any]:
    """(metrics of a step, weights after it)."""
    config = trainer_config(model, *words)
    trainer = start_trainer(config)
    trainer.load()
    hooks = hooks or UpdateHooks(args="the args")
    result = run_update(trainer, batch(1), config, rollout_id=0, hooks=hooks)
    return result.step_metrics[0], weights_of(trainer)


@pytest.mark.parametrize("words", [(), ("--calculate-per-token-loss",)])
def test_a_function_that_reproduces_the_sft_loss_takes_the_same_step(
    model: str, words: tuple[str, ...]
) -> None:
    expected = updated(model, "--loss-type", "sft_loss", *words)
    own = ("--loss-type", "custom_loss", "--custom-loss-function-path", f"{HERE}nll")
    found = updated(model, *own, "--disable-compute-advantages-and-returns", *words)
    for name in ("loss", "grad_norm"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-5)
    assert found[0]["nll"] == pytest.approx(found[0]["loss"])
    trains = [float(mask.any()) for mask in batch(1).loss_masks]
    assert found[0]["one"] == pytest.approx(1.0 if words else sum(trains) / len(trains))
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0.0, atol=2e-6, msg=name)


def test_the_function_sees_what_is_documented(model: str) -> None:
    own = ("--loss-type", "custom_loss", "--custom-loss-function-path", f"{HERE}nll")
    updated(model, *own)
    seen, data = user_losses.SEEN["batch"], batch(1)
    assert user_losses.SEEN["args"] == "the args"
    length = seen["tokens"].shape[1]
    assert user_losses.SEEN["logits"].shape == (1, length, VOCAB)
    assert 0 <= length - sum(data.tokens.lengths) < PADDING[DEVICE]
    assert torch.equal(torch.cat(seen["unconcat_tokens"]), seen["tokens"][0])
    lengths = list(data.response_lengths)
    assert seen["response_lengths"] == lengths
    assert seen["total_lengths"] == list(data.tokens.lengths)
    for name in ("loss_masks", "log_probs", "advantages", "returns"):
        assert [len(row) for row in seen[name]] == lengths, name
    masks, ends = torch.cat(seen["loss_masks"]), accumulate(seen["total_lengths"])
    predicting = torch.cat(
        [torch.arange(end - n - 1, end - 1) for end, n in zip(ends, lengths, strict=True)]
    )
    expected = torch.zeros(sum(data.tokens.lengths))
    expected[predicting] = masks
    assert torch.equal(seen["full_loss_masks"][0], expected)
    reference = start_trainer(trainer_config(model))
    reference.load()
    for row, log_probs in zip(
        seen["log_probs"], reference.log_probs(data, ModelTag.ACTOR), strict=True
    ):
        torch.testing.assert_close(row, log_probs, rtol=0.0, atol=1e-5)


def test_recomputing_the_function_changes_no_bit(model: str) -> None:
    own = ("--loss-type", "custom_loss", "--custom-loss-function-path", f"{HERE}nll")
    results: list[Any] = []
    for words, expected_calls in ((), 1), (("--recompute-loss-function",), 2):
        user_losses.SEEN["calls"] = 0
        results.append(updated(model, *own, "--disable-compute-advantages-and-returns", *words))
        assert user_losses.SEEN["calls"] == expected_calls
    assert results[0][0] == results[1][0]
    assert [n for n, w in results[0][1].items() if not torch.equal(w, results[1][1][n])] == []


def test_a_function_without_metrics_is_refused(model: str) -> None:
    own = ("--loss-type", "custom_loss", "--custom-loss-function-path", f"{HERE}no_pair")
    with pytest.raises(DataError, match=r"must return \(loss, metrics\)"):
        updated(model, *own, "--disable-compute-advantages-and-returns")


def test_an_own_correction_and_reducer_train_like_the_built_in_ones(model: str) -> None:
    """Weights of 1 and a mean over rollouts: the plain policy loss."""
    data = batch(1)
    engine = [torch.full((n,), -1.0) for n in data.response_lengths]
    data = replace(data, rollout_log_probs=Ragged.from_rows(engine, torch.float32))
    steps: list[dict[str, float]] = []
    for words in (
        (),
        (
            *("--use-tis", "--custom-tis-function-path", f"{HERE}unchanged"),
            *("--custom-pg-loss-reducer-function-path", f"{HERE}mean_of_means"),
        ),
    ):
        config = trainer_config(model, *words)
        trainer = start_trainer(config)
        trainer.load()
        steps.append(run_update(trainer, data, config, rollout_id=0).step_metrics[0])
    for name in ("loss", "grad_norm", "pg_loss", "entropy_loss"):
        assert steps[1][name] == pytest.approx(steps[0][name], rel=1e-5), name
