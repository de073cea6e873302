"""A critic against transformers' backbone with a linear head."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import feature_cases as cases
from support.critics import (
    CLIP,
    critic_reference,
    critic_step,
    head_weight,
    set_head,
)
from support.megatron_runs import make_tiny_qwen3, random_batch, start_trainer, trainer_config

from slime.data.batch import RolloutBatch
from slime.errors import CheckpointError
from slime.training.interface import ModelTag
from slime.training.value_loss import value_loss

pytestmark = pytest.mark.trainer

LOSS = partial(value_loss, clip=CLIP)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a tied embedding: a critic unties it."""
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), vocab_size=cases.VOCAB)


def batch(seed: int) -> RolloutBatch:
    return random_batch(num_samples=6, vocab_size=cases.VOCAB, seed=seed)


def critic(model: str, *words: str) -> Any:
    trainer = start_trainer(trainer_config(model, *words), role="critic")
    trainer.load()
    return trainer


def test_values_and_two_steps_equal_those_of_transformers(model: str) -> None:
    batches, probe = [batch(1), batch(2)], batch(9)
    expected = critic_reference(model, batches, probe)
    trainer = critic(model)
    set_head(trainer, head_weight())
    values = [trainer.values(probe)]
    metrics = [trainer.train_step(critic_step(b), LOSS) for b in batches]
    values.append(trainer.values(probe))
    assert [m["loss"] for m in metrics] == pytest.approx(expected.losses, rel=1e-5)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(expected.grad_norms, rel=1e-4)
    assert [m["value_clipfrac"] for m in metrics] == pytest.approx(expected.clipfracs, abs=1e-6)
    for ours, theirs in zip(values, expected.values, strict=True):
        for row, reference in zip(ours, theirs, strict=True):
            assert row.dtype == torch.float32
            torch.testing.assert_close(row, reference, rtol=0.0, atol=2e-5)
    head = trainer._bare[0].output_layer.weight
    torch.testing.assert_close(head.detach().cpu(), expected.head, rtol=0.0, atol=5e-6)


def test_values_start_at_zero_and_the_first_step_moves_the_head_alone(model: str) -> None:
    trainer = critic(model)
    before = {name: p.clone() for name, p in trainer._bare[0].named_parameters()}
    assert all(not row.any() for row in trainer.values(batch(1)))
    trainer.train_step(critic_step(batch(1)), LOSS)
    decayed = 1 - 1e-3 * 0.01
    for name, parameter in trainer._bare[0].named_parameters():
        if name == "output_layer.weight":
            assert parameter.abs().max() > 1e-4
        else:
            kept = before[name] * (decayed if parameter.dim() > 1 else 1.0)
            torch.testing.assert_close(parameter, kept, rtol=1e-6, atol=1e-7)


def test_a_critics_checkpoint_restores_its_head(model: str, tmp_path: Path) -> None:
    words = ("--save", str(tmp_path), "--save-interval", "1")
    first = critic(model, *words)
    for seed in (1, 2):
        first.train_step(critic_step(batch(seed)), LOSS)
    first.save(0)
    expected = first.train_step(critic_step(batch(3)), LOSS)
    resumed = start_trainer(trainer_config(model, *words, "--load", str(tmp_path)), role="critic")
    assert resumed.load() == 1
    assert resumed.train_step(critic_step(batch(3)), LOSS) == expected
    for left, right in zip(first.values(batch(4)), resumed.values(batch(4)), strict=True):
        assert torch.equal(left, right)


def test_an_actors_checkpoint_is_no_critics(model: str, tmp_path: Path) -> None:
    words = ("--save", str(tmp_path), "--save-interval", "1")
    actor = start_trainer(trainer_config(model, *words))
    actor.load()
    actor.save(0)
    untied = trainer_config(model, "--load", str(tmp_path))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        start_trainer(untied, role="critic").load()


def test_calls_of_the_other_role_are_refused(model: str) -> None:
    trainer = critic(model)
    with pytest.raises(RuntimeError, match=r"log_probs\(\) .* this is a critic"):
        trainer.log_probs(batch(1), ModelTag.ACTOR)
    with pytest.raises(RuntimeError, match=r"values\(\) .* this is a actor"):
        start_trainer(trainer_config(model)).values(batch(1))
