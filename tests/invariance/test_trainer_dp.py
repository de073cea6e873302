"""Two data-parallel ranks on gloo against one process, and against transformers with AdamW."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import megatron_dp_worker as worker
from support.device import skip_unless_possible
from support.megatron_runs import (
    make_tiny_qwen3,
    policy_gradient_loss,
    rank_batch,
    reference_run,
    start_trainer,
    train_step,
    trainer_config,
    weights_of,
)
from support.ranks import last_words, run_module

pytestmark = pytest.mark.trainer

WORLD_SIZE = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), vocab_size=worker.VOCAB)


@pytest.fixture(scope="module")
def folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two ranks left; they run once for all tests here."""
    skip_unless_possible(WORLD_SIZE)
    folder = tmp_path_factory.mktemp("dp")
    ended = run_module(worker.__name__, WORLD_SIZE, [model, str(folder)], folder)
    assert ended == [0] * WORLD_SIZE, last_words(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def case(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt", weights_only=False)


def assert_close_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, expected in right.items():
        torch.testing.assert_close(left[name], expected, rtol=0.0, atol=5e-6, msg=name)


def test_two_ranks_equal_transformers_with_adamw(model: str, folder: Path) -> None:
    plain = case(folder, "plain")
    reference = reference_run(model, [worker.whole_batch(seed) for seed in (1, 2, 3)])
    metrics = plain["metrics"]
    assert [m["loss"] for m in metrics] == pytest.approx(reference.losses, abs=2e-5)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(reference.grad_norms, rel=1e-5)
    assert_close_weights(plain["weights"], reference.weights)


def test_all_ranks_report_the_same_metrics(folder: Path) -> None:
    for name in ("plain", "overlapped", "resumed"):
        first, *others = case(folder, name)["all_metrics"]
        assert all(metrics == first for metrics in others)


def test_overlapping_communication_changes_no_bit(folder: Path) -> None:
    plain, overlapped = case(folder, "plain"), case(folder, "overlapped")
    assert overlapped["metrics"] == plain["metrics"]
    assert all(map(torch.equal, overlapped["log_probs"], plain["log_probs"]))
    for name, expected in plain["weights"].items():
        assert torch.equal(overlapped["weights"][name], expected), name


def test_resumed_ranks_continue_bit_for_bit(folder: Path) -> None:
    plain, resumed = case(folder, "plain"), case(folder, "resumed")
    assert resumed["metrics"] == plain["metrics"][worker.SAVED_AFTER :]
    for name, expected in plain["weights"].items():
        assert torch.equal(resumed["weights"][name], expected), name


def test_one_process_continues_the_checkpoint_of_two(model: str, folder: Path) -> None:
    trainer = start_trainer(trainer_config(model, "--load", str(folder / "checkpoint")))
    assert trainer.load() == worker.SAVED_AFTER + 1
    batch = rank_batch(worker.whole_batch(3), 0, 1, micro_batches=3)
    metrics = trainer.train_step(train_step(batch), policy_gradient_loss)
    plain = case(folder, "plain")
    assert metrics == pytest.approx(plain["metrics"][-1], rel=1e-5, abs=1e-6)
    assert_close_weights(weights_of(trainer), plain["weights"])
