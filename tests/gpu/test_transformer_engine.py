"""--transformer-impl transformer_engine: near transformers, and its checkpoints are ours."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support import parallel_cases as cases
from support.device import possible_ranks
from support.megatron_runs import (
    Reference,
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
from support.ranks import make_models, result, run_ranks
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
MARKS = {2: pytest.mark.gpu2, 4: pytest.mark.gpu4}


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and what the ranks left: one start for all cases of so many cards."""
    folder = tmp_path_factory.mktemp("layouts")
    make_models(folder, [case.model for case in cases.TE_CASES.values()])
    for world_size in possible_ranks((2, 4)):
        names = [name for name, case in cases.TE_CASES.items() if case.ranks == world_size]
        run_ranks(folder, world_size, names)
    return folder


@functools.cache
def reference(model: Path) -> Reference:
    batches: list[Any] = [
        random_batch(num_samples=cases.NUM_SAMPLES, vocab_size=cases.VOCAB, seed=seed)
        for seed in (cases.SEEDS[0], cases.PROBE_SEED)
    ]
    return reference_run(model, batches[:1], probe=batches[1])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=MARKS[case.ranks]) for name, case in cases.TE_CASES.items()],
)
def test_layouts_are_near_transformers(folder: Path, name: str) -> None:
    case = cases.TE_CASES[name]
    found, expected = result(folder, name), reference(folder / case.model)
    (metrics,) = found["metrics"]
    assert metrics["loss"] == pytest.approx(expected.losses[0], rel=0.03, abs=0.01)
    assert metrics["grad_norm"] == pytest.approx(expected.grad_norms[0], rel=0.05)
