"""Layers and models of the user's own, by --spec and --custom-model-provider-path."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import spec_plugin
from support.megatron_runs import (
    make_tiny_qwen3,
    policy_gradient_loss,
    random_batch,
    start_trainer,
    train_step,
    trainer_config,
    weights_of,
)
from support.tiny_families import make_tiny_family

from slime.checkpoint.folders import megatron_to_hf
from slime.checkpoint.hf import HfFolder
from slime.errors import ConfigError, ShapeMismatch
from slime.training.interface import ModelTag

pytestmark = pytest.mark.trainer

VOCAB = 106
PROVIDER = ("--custom-model-provider-path", "support.spec_plugin.provide")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), vocab_size=VOCAB)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    spec_plugin.CALLS.clear()


def started(model: str, *words: str) -> Any:
    trainer = start_trainer(trainer_config(model, *words))
    trainer.load()
    return trainer


@dataclass(frozen=True)
class Outcome:
    """Of one optimizer step, and the log-probs after it."""

    metrics: dict[str, float]
    log_probs: list[torch.Tensor]
    weights: dict[str, torch.Tensor]


def step(trainer: Any, seed: int = 0) -> Outcome:
    batch = random_batch(num_samples=3, vocab_size=VOCAB, seed=seed)
    metrics = trainer.train_step(train_step(batch), policy_gradient_loss)
    return Outcome(metrics, trainer.log_probs(batch, ModelTag.ACTOR), weights_of(trainer))


def assert_same_bits(found: Outcome, expected: Outcome) -> None:
    assert found.metrics == expected.metrics
    assert all(map(torch.equal, found.log_probs, expected.log_probs))
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], w) for name, w in expected.weights.items())


def test_the_function_of_spec_makes_the_layers(model: str) -> None:
    expected = step(started(model))
    assert spec_plugin.CALLS == []
    found = step(started(model, "--spec", "support.spec_plugin", "plain_layers"))
    assert spec_plugin.CALLS == [None]
    assert_same_bits(found, expected)


def test_the_spec_of_one_layer_stands_for_all(model: str) -> None:
    # The last layer computes all tokens then, in another order.
    expected = step(started(model))
    found = step(started(model, "--spec", "support.spec_plugin", "one_layer"))
    for ours, theirs in zip(found.log_probs, expected.log_probs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("glm4", "--spec slime_plugins.models.glm4 get_glm_spec"),
        ("olmo2", "--spec slime_plugins.models.olmo2 get_olmo2_spec"),
    ],
)
def test_a_documented_spec_gives_the_bits_of_the_family_without_it(
    model_type: str, words: str, tmp_path: Path
) -> None:
    folder = make_tiny_family(tmp_path, model_type, vocab_size=VOCAB)
    assert_same_bits(step(started(folder, *words.split())), step(started(folder)))


def test_a_provider_trains_saves_resumes_and_converts(model: str, tmp_path: Path) -> None:
    save = ("--save", str(tmp_path / "save"), "--save-interval", "1")
    trainer = started(model, *PROVIDER, *save)
    assert spec_plugin.CALLS == [None, None]
    first = step(trainer)
    assert_same_bits(first, step(started(model)))
    trainer.save(0)
    megatron_to_hf(tmp_path / "save", tmp_path / "hf", origin=Path(model))
    with HfFolder(tmp_path / "hf") as folder:
        assert all(torch.equal(folder.tensor(n), first.weights[n]) for n in folder.names())
    resumed = started(model, *PROVIDER, "--load", str(tmp_path / "save"))
    assert_same_bits(step(resumed, seed=1), step(trainer, seed=1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("no_such_module no_layers", r"no module 'no_such_module'; is its folder on PYTHONPATH"),
        ("support.spec_plugin no_layers", r"'support.spec_plugin' has no 'no_layers'"),
        ("support.spec_plugin", r"must be a module and a function .* get_glm_spec"),
        ("support.spec_plugin VOID", r"has no 'VOID'"),
        ("support.spec_plugin CALLS", r"must be callable as fn\(args, config, vp_stage\)"),
        ("support.spec_plugin two_arguments", r"slime calls fn\(args, config, vp_stage\), found"),
        ("support.spec_plugin nothing", r"returned None; return TransformerBlockSubmodules"),
        ("support.spec_plugin half_of_the_layers", r"returned 1 layers, but .* has 2; block_spec"),
    ],
)
def test_a_wrong_spec_is_refused_at_start(model: str, words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start_trainer(trainer_config(model, "--spec", *words.split()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("provide_something", r"has no 'provide_something'"),
        ("provide_nothing", r"provide_nothing: returned None; return a GPTModel"),
        ("provide_a_matrix", r"its Linear lacks decoder, .*, output_layer, .*; return a GPTModel"),
        ("provide_without_output", r"lacks output_layer"),
        ("provide_from_one_argument", r"slime calls fn\(pre_process, post_process\), found"),
    ],
)
def test_a_wrong_provider_is_refused_at_start(model: str, name: str, message: str) -> None:
    words = ("--custom-model-provider-path", f"support.spec_plugin.{name}")
    with pytest.raises(ConfigError, match=message):
        start_trainer(trainer_config(model, *words))


def test_a_weight_of_another_shape_is_named_when_it_loads(model: str) -> None:
    trainer = start_trainer(trainer_config(model, "--spec", "support.spec_plugin", "narrow_norms"))
    message = r"layers\.0\.input_layernorm\.weight is \[1\] in the model, but \[64\] by the table"
    with pytest.raises(ShapeMismatch, match=message):
        trainer.load()


def test_heads_that_a_subclass_changes_are_never_made_by_the_kernel(tmp_path: Path) -> None:
    def can_fuse(model_type: str) -> bool:
        folder = make_tiny_family(tmp_path / model_type, model_type, vocab_size=VOCAB)
        trainer = start_trainer(trainer_config(folder))
        return trainer._bare[0].decoder.layers[0].self_attention._can_fuse()

    assert can_fuse("glm4")
    assert not can_fuse("olmo2")


def test_olmo2_is_not_cut_through_a_key_head() -> None:
    from slime_plugins.models.olmo2 import get_olmo2_spec

    config: Any = SimpleNamespace(
        num_attention_heads=8, num_query_groups=2, tensor_model_parallel_size=4
    )
    with pytest.raises(ConfigError, match="size 4 does not divide the 2 key heads"):
        get_olmo2_spec(argparse.Namespace(), config)
