"""A trainer that was closed leaves nothing behind: no model, no groups."""

import gc
from pathlib import Path

import pytest
from support.megatron_runs import (
    make_tiny_qwen3,
    policy_gradient_loss,
    random_batch,
    start_trainer,
    train_step,
    trainer_config,
)

pytestmark = pytest.mark.trainer

VOCAB = 106


def test_a_closed_trainers_model_is_collected(tmp_path: Path) -> None:
    def models() -> int:
        gc.collect()
        names = [type(found).__name__ for found in gc.get_objects()]
        return names.count("DistributedDataParallel")

    folder, before = make_tiny_qwen3(tmp_path / "model", vocab_size=VOCAB), models()
    trainer = start_trainer(trainer_config(folder))
    trainer.load()
    batch = random_batch(num_samples=2, vocab_size=VOCAB, seed=0)
    trainer.train_step(train_step(batch), policy_gradient_loss)
    assert models() == before + 1
    trainer.close()
    del trainer
    assert models() == before
