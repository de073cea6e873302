"""A checkpoint of one parallel layout goes on in another one, and in one process."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import parallel_cases as cases
from support.device import skip_unless_possible
from support.megatron_runs import (
    random_batch,
    rank_batch,
    start_trainer,
    trainer_config,
    weights_of,
)
from support.ranks import make_models, result, run_ranks
from torch import Tensor

pytestmark = pytest.mark.trainer

CHECKPOINTS = "slime.backends.megatron.state.checkpoint"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and what two ranks left of all cases."""
    skip_unless_possible(2)
    folder = tmp_path_factory.mktemp("resharding")
    make_models(folder, [case.model for case in cases.RESHARDS.values()])
    run_ranks(folder, 2, list(cases.RESHARDS))
    return folder


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def in_one_process(folder: Path) -> Any:
    """What one process makes of the checkpoint of a case; computed once for each."""

    @functools.cache
    def load(name: str) -> dict[str, Any]:
        found = result(folder, name)  # the ranks' own error comes first
        checkpoint = cases.checkpoint_of(folder, name)
        config = trainer_config(folder / cases.RESHARDS[name].model, "--load", str(checkpoint))
        trainer = start_trainer(config)
        with cases.log_lines(CHECKPOINTS) as lines:
            assert trainer.load() == found["first_rollout"] == 1
        loaded = weights_of(trainer)

        def batch(seed: int) -> Any:
            whole = random_batch(num_samples=cases.NUM_SAMPLES, vocab_size=cases.VOCAB, seed=seed)
            return rank_batch(whole, 0, 1, micro_batches=2)

        return {"loaded": loaded, "resumed": cases.second_step(trainer, batch), "log": lines}

    return load


def assert_equal_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, expected in right.items():
        assert torch.equal(left[name], expected), name


def assert_same_step(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Up to the order of sums; misplaced moments would move weights by 1e-4 and more."""
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5, abs=1e-6)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0.0, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", cases.RESHARDS)
def test_another_layout_loads_every_bit_of_the_weights(folder: Path, name: str) -> None:
    found = result(folder, name)
    assert_equal_weights(found["loaded"], found["saved"])


@pytest.mark.parametrize("name", cases.RESHARDS)
def test_another_layout_takes_the_step_of_the_run_that_went_on(folder: Path, name: str) -> None:
    found = result(folder, name)
    assert_same_step(found["resumed"], found["went_on"])


@pytest.mark.parametrize("name", cases.RESHARDS)
def test_one_process_goes_on_from_any_layout(folder: Path, name: str, in_one_process: Any) -> None:
    found, alone = result(folder, name), in_one_process(name)
    assert_equal_weights(alone["loaded"], found["saved"])
    assert_same_step(alone["resumed"], found["went_on"])


def test_random_states_of_other_ranks_are_left_alone_and_said_so(
    folder: Path, in_one_process: Any
) -> None:
    assert "not loaded" in "".join(result(folder, "tp2 to pp2")["log"])
    assert "1 pipeline x 2 tensor ranks and there are 1 x 1" in "".join(
        in_one_process("tp2 to pp2")["log"]
    )


def test_random_states_of_as_many_ranks_are_loaded(folder: Path, in_one_process: Any) -> None:
    assert result(folder, "tp2 sp to tp2")["log"] == []
    assert in_one_process("dp2 to tp2")["log"] == []
    assert in_one_process("qwen3_moe ep2 to dp2")["log"] == []
