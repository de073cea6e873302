"""Memory given back and taken again: nothing is left in between, and every bit is there after."""

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


def trained(folder: Path) -> Any:
    """A trainer after one step, so that moments are not 0."""
    trainer = start_trainer(trainer_config(folder))
    trainer.load()
    trainer.train_step(train_step(batch(1)), policy_gradient_loss)
    return trainer


def batch(seed: int) -> Any:
    return random_batch(num_samples=4, vocab_size=VOCAB, seed=seed)


def tensors(trainer: Any) -> list[torch.Tensor]:
    """Weights, buffers, main weights and moments."""
    from slime.backends.megatron.optimizer.distributed import torch_optimizers

    found = [p.data for chunk in trainer._bare for p in chunk.parameters()]
    found += [b for chunk in trainer._bare for b in chunk.buffers()]
    for optimizer in torch_optimizers(trainer._optimizer):
        found += [p.data for group in optimizer.param_groups for p in group["params"]]
        found += [value for state in optimizer.state.values() for value in state.values()]
    return found


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_sleeping_changes_no_bit_and_holds_no_memory(tmp_path: Path, family: str) -> None:
    from slime.backends.megatron.optimizer.offload import DeviceMemory

    folder = Path(make_tiny_family(tmp_path / family, family, vocab_size=VOCAB))
    trainer, awake = trained(folder), trained(folder)
    before = [tensor.clone() for tensor in tensors(trainer)]
    memory = DeviceMemory(trainer._model, trainer._optimizer)
    for _ in range(2):
        freed = memory.give_back()
        assert memory.is_away
        assert memory.give_back() == 0
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors(trainer))
        assert freed >= sum(p.numel() * p.element_size() for p in trainer._bare[0].parameters())
        memory.take_again()
        assert not memory.is_away
    for found, expected in zip(tensors(trainer), before, strict=True):
        assert torch.equal(found, expected)
    found = trainer.train_step(train_step(batch(2)), policy_gradient_loss)
    assert found == awake.train_step(train_step(batch(2)), policy_gradient_loss)
    expected = weights_of(awake)
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, expected[name]), name


def test_a_sleeping_trainer_says_so_and_wakes_with_zero_gradients(tmp_path: Path) -> None:
    from slime.backends.megatron.optimizer.offload import DeviceMemory

    trainer = trained(Path(make_tiny_family(tmp_path / "qwen3", "qwen3", vocab_size=VOCAB)))
    memory = trainer._memory
    assert isinstance(memory, DeviceMemory)
    memory.give_back()
    with pytest.raises(RuntimeError, match="wake_up"):
        trainer.train_step(train_step(batch(2)), policy_gradient_loss)
    with pytest.raises(RuntimeError, match="wake_up"):
        list(trainer.named_weights())
    trainer.wake_up()
    gradients = [p.main_grad for p in trainer._bare[0].parameters()]
    assert all(not gradient.any() for gradient in gradients)
