"""--transformer-impl transformer_engine: near transformers, and its checkpoints are ours.

Its layouts are in test_layouts.py.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support.megatron_runs import (
    hf_log_probs,
    hf_model,
    policy_gradient_loss,
    random_batch,
    reference_run,
    start_trainer,
    train_step,
    trainer_config,
    weights_of,
)
from support.tiny_families import make_tiny_family

from slime.errors import ConfigError
from slime.training.interface import ModelTag

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="TransformerEngine is not installed",
)

VOCAB = 106
BF16 = ("--device", "cuda", "--bf16")
TE = (*BF16, "--transformer-impl", "transformer_engine")


def started(folder: Path | str, *words: str) -> Any:
    trainer = start_trainer(trainer_config(folder, *words))
    trainer.load()
    return trainer


def batch(seed: int) -> Any:
    return random_batch(num_samples=8, vocab_size=VOCAB, seed=seed, longest=300)


def uses_its_modules(trainer: Any) -> bool:
    kinds = {type(module).__name__ for module in trainer._bare[0].modules()}
    return {"TELayerNormColumnParallelLinear", "PackedTEAttention"} <= kinds


@pytest.mark.gpu1
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "glm4", "qwen3_moe", "glm4_moe"])
def test_a_step_is_near_that_of_transformers(family: str, tmp_path: Path) -> None:
    folder = make_tiny_family(tmp_path, family, vocab_size=VOCAB)
    trainer = started(folder, *TE)
    assert uses_its_modules(trainer)
    rows = trainer.log_probs(batch(0), ModelTag.ACTOR)
    expected = hf_log_probs(hf_model(folder), batch(0))
    gaps = torch.cat([(a - b).abs() for a, b in zip(rows, expected, strict=True)])
    assert gaps.mean() < 0.05
    metrics = trainer.train_step(train_step(batch(1)), policy_gradient_loss)
    reference = reference_run(folder, [batch(1)])
    assert metrics["loss"] == pytest.approx(reference.losses[0], rel=0.03, abs=0.01)
    assert metrics["grad_norm"] == pytest.approx(reference.grad_norms[0], rel=0.05)


@pytest.mark.gpu1
@pytest.mark.parametrize(("saves", "loads"), [(TE, BF16), (BF16, TE)])
def test_a_checkpoint_goes_on_with_the_other_layers(
    tmp_path: Path, saves: tuple[str, ...], loads: tuple[str, ...]
) -> None:
    folder = make_tiny_family(tmp_path / "model", "qwen3_moe", vocab_size=VOCAB)
    first = started(folder, *saves, "--save", str(tmp_path / "save"), "--save-interval", "1")
    first.train_step(train_step(batch(1)), policy_gradient_loss)
    first.save(0)
    weights = weights_of(first)
    expected = first.train_step(train_step(batch(2)), policy_gradient_loss)
    second = started(folder, *loads, "--load", str(tmp_path / "save"))
    for name, weight in weights_of(second).items():
        assert torch.equal(weight, weights[name]), name
    found = second.train_step(train_step(batch(2)), policy_gradient_loss)
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.03, abs=0.01)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)


@pytest.mark.gpu1
def test_latent_attention_and_fp32_are_refused(tmp_path: Path) -> None:
    latent = make_tiny_family(tmp_path / "latent", "deepseek_v3", vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="latent attention of packs is slime's own"):
        start_trainer(trainer_config(latent, *TE))
    dense = make_tiny_family(tmp_path / "dense", "qwen3", vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="bfloat16 only"):
        start_trainer(trainer_config(dense, *TE, "--no-bf16"))
