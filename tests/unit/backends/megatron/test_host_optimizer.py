"""--optimizer-cpu-offload changes where Adam's numbers are, and none of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.megatron_runs import (
    policy_gradient_loss,
    random_batch,
    start_trainer,
    train_step,
    trainer_config,
    weights_of,
)
from support.tiny_families import make_tiny_family

pytestmark = pytest.mark.trainer

VOCAB = 106
OFFLOAD = ("--optimizer-cpu-offload", "--use-precision-aware-optimizer")
HALF = (*OFFLOAD, "--optimizer-offload-fraction", "0.5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With experts: dense and expert parameters have an optimizer each."""
    folder = tmp_path_factory.mktemp("host") / "model"
    return Path(make_tiny_family(folder, "qwen3_moe", vocab_size=VOCAB))


def started(model: Path, *words: str) -> Any:
    trainer = start_trainer(trainer_config(model, *words))
    trainer.load()
    return trainer


def steps(trainer: Any, *seeds: int) -> list[dict[str, float]]:
    batches = [random_batch(num_samples=6, vocab_size=VOCAB, seed=seed) for seed in seeds]
    return [trainer.train_step(train_step(batch), policy_gradient_loss) for batch in batches]


def moments(trainer: Any) -> list[torch.Tensor]:
    from slime.backends.megatron.optimizer.distributed import torch_optimizers

    return [
        state[name].cpu()
        for optimizer in torch_optimizers(trainer._optimizer)
        for state in optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq", "step")
    ]


def hosted_share(trainer: Any) -> float:
    """The share of the numbers that the optimizer has on the host."""
    from slime.backends.megatron.optimizer.distributed import megatron_optimizers

    links = [link for part in megatron_optimizers(trainer._optimizer) for link in part._links]
    hosted = sum(link.weight.numel() for link in links if link.is_hosted)
    return hosted / sum(link.weight.numel() for link in links)


def assert_equal_weights(one: Any, two: Any) -> None:
    ours, theirs = weights_of(one), weights_of(two)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


@pytest.mark.parametrize("words", [OFFLOAD, HALF], ids=["all", "half"])
def test_steps_have_the_bits_of_an_optimizer_on_the_device(
    model: Path, words: tuple[str, ...]
) -> None:
    hosted, usual = started(model, *words), started(model)
    assert steps(hosted, 1, 2, 3) == steps(usual, 1, 2, 3)
    assert_equal_weights(hosted, usual)
    for ours, theirs in zip(moments(hosted), moments(usual), strict=True):
        assert torch.equal(ours, theirs)
    share = hosted_share(hosted)
    assert share == 1.0 if words is OFFLOAD else 0.4 < share < 0.8


@pytest.mark.parametrize(("saves", "loads"), [(OFFLOAD, ()), ((), OFFLOAD), (HALF, OFFLOAD)])
def test_a_checkpoint_goes_on_wherever_the_optimizer_is(
    model: Path, tmp_path: Path, saves: tuple[str, ...], loads: tuple[str, ...]
) -> None:
    first = started(model, *saves, "--save", str(tmp_path), "--save-interval", "1")
    steps(first, 1)
    first.save(0)
    second = started(model, *loads, "--load", str(tmp_path))
    assert steps(second, 2, 3) == steps(first, 2, 3)
    assert_equal_weights(second, first)


def test_moments_start_again_where_the_flag_says_so(model: Path) -> None:
    from slime.backends.megatron.optimizer.distributed import reset_moments

    trainer = started(model, *OFFLOAD)
    steps(trainer, 1)
    assert any(bool(moment.any()) for moment in moments(trainer))
    reset_moments(trainer._optimizer)
    assert not any(bool(moment.any()) for moment in moments(trainer))


def test_pieces_and_their_order_change_no_bit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slime.backends.megatron.optimizer import host_optimizer

    usual = started(model)
    expected = steps(usual, 1, 2)
    monkeypatch.setattr(host_optimizer, "_PIECE", 1024)
    cut = started(model, *OFFLOAD)
    assert steps(cut, 1, 2) == expected
    assert_equal_weights(cut, usual)
