"""Replayed experts against transformers whose experts are forced."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.megatron_runs import (
    grouped,
    make_tiny_qwen3,
    policy_gradient_loss,
    random_batch,
    rank_batch,
    start_trainer,
    train_step,
    trainer_config,
    weights_of,
)
from support.routing import (
    RoutingReference,
    SeenLogProbs,
    move_trainers_routers,
    routing_reference,
    with_experts,
)
from support.tiny_families import make_tiny_family
from torch import Tensor

from slime.data.batch import FILLER_INDEX, RolloutBatch
from slime.errors import ConfigError, DataError
from slime.training.interface import ModelTag

pytestmark = pytest.mark.trainer

VOCAB = 106
FAMILIES = ("qwen3_moe", "deepseek_v3")
R2, R3 = "--use-routing-replay", "--use-rollout-routing-replay"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
MOE = "--recompute-granularity selective --recompute-modules moe"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {f: make_tiny_family(folder / f, f, vocab_size=VOCAB) for f in FAMILIES}


@pytest.fixture(scope="module")
def references(folders: dict[str, str]) -> dict[str, RoutingReference]:
    return {family: routing_reference(folder, batch()) for family, folder in folders.items()}


def batch() -> RolloutBatch:
    """Two micro-batches; some samples share their prompt, which is computed once."""
    whole = random_batch(num_samples=8, vocab_size=VOCAB, seed=3)
    return rank_batch(grouped(whole, 2), 0, 1, micro_batches=2)


def started(folder: str, words: str = "") -> Any:
    trainer = start_trainer(trainer_config(folder, *words.split()))
    trainer.load()
    return trainer


def trained(trainer: Any, data: RolloutBatch) -> tuple[list[Tensor], dict[str, float]]:
    seen = SeenLogProbs()
    metrics = trainer.train_step(train_step(data), seen)
    return seen.by_sample(data), metrics


def assert_close(rows: list[Tensor], expected: list[Tensor], atol: float = 2e-5) -> None:
    for row, reference in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, reference, rtol=0.0, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_same_weights_replay_changes_nothing(family: str, folders: dict[str, str]) -> None:
    plain, replaying = started(folders[family]), started(folders[family], R2)
    replaying.log_probs(batch(), ModelTag.ACTOR)
    expected = plain.train_step(train_step(batch()), policy_gradient_loss)
    found = replaying.train_step(train_step(batch()), policy_gradient_loss)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    ours = weights_of(replaying)
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(ours[name], weight, rtol=0.0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen3_moe", R2),
        ("qwen3_moe", f"{R2} {FULL}"),
        ("qwen3_moe", R3),
        ("deepseek_v3", R2),
        ("deepseek_v3", f"{R2} {MOE}"),
        ("deepseek_v3", f"{R3} {FULL}"),
    ],
)
def test_moved_routers_still_choose_the_old_experts(
    family: str,
    words: str,
    folders: dict[str, str],
    references: dict[str, RoutingReference],
) -> None:
    trainer, reference = started(folders[family], words), references[family]
    data = with_experts(batch(), reference.experts) if R3 in words else batch()
    if R2 in words:
        trainer.log_probs(data, ModelTag.ACTOR)
    move_trainers_routers(trainer)
    rows, metrics = trained(trainer, data)
    assert_close(rows, reference.log_probs)
    assert metrics["grad_norm"] == pytest.approx(reference.grad_norm, rel=1e-4)
    gaps = zip(reference.log_probs, reference.free_log_probs, strict=True)
    assert max(float((a - b).abs().max()) for a, b in gaps) > 0.05, "the routers moved too little"


def test_log_probs_take_the_engines_experts_and_the_reference_its_own(
    folders: dict[str, str], references: dict[str, RoutingReference]
) -> None:
    reference = references["qwen3_moe"]
    trainer = started(folders["qwen3_moe"], R3)
    data = with_experts(batch(), reference.experts)
    move_trainers_routers(trainer)
    trainer.copy_weights(ModelTag.REF)
    assert_close(trainer.log_probs(data, ModelTag.ACTOR), reference.log_probs)
    assert_close(trainer.log_probs(data, ModelTag.REF), reference.free_log_probs)


def test_two_steps_of_a_round_replay_one_recording(folders: dict[str, str]) -> None:
    """The first step moves the weights; the second still has the experts of before."""
    data = batch()
    plan = data.steps[0]
    halves = tuple(replace(plan, micro_batches=(samples,)) for samples in plan.micro_batches)
    trainer = started(folders["qwen3_moe"], R2)
    trainer.log_probs(replace(data, steps=halves), ModelTag.ACTOR)
    for step_id in (0, 1):
        step = replace(train_step(data), plan=halves[step_id], step_id=step_id)
        assert trainer.train_step(step, policy_gradient_loss)["grad_norm"] > 0.0


def test_tokens_that_were_not_recorded_choose_themselves(
    folders: dict[str, str], references: dict[str, RoutingReference]
) -> None:
    trainer, reference = started(folders["deepseek_v3"], R3), references["deepseek_v3"]
    move_trainers_routers(trainer)
    nothing = [experts * 0 - 1 for experts in reference.experts]
    rows, _ = trained(trainer, with_experts(batch(), nothing))
    assert_close(rows, reference.free_log_probs)


def test_a_sample_that_trains_nothing_needs_no_experts(
    folders: dict[str, str], references: dict[str, RoutingReference]
) -> None:
    data = batch()
    data.loss_masks.rows()[1].zero_()
    experts: list[Any] = list(references["qwen3_moe"].experts)
    experts[1] = experts[2] = None
    indices = (0, 1, FILLER_INDEX, *range(3, len(data)))
    data = replace(with_experts(data, experts), sample_indices=indices)
    assert len(started(folders["qwen3_moe"], R3).log_probs(data, ModelTag.ACTOR)) == len(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: None, "sample 3 trains but has no rollout_routed_experts"),
        (lambda e: e[:-1], r"sample 3: rollout_routed_experts has shape"),
        (lambda e: e[:, :3], r"sample 3: .* expected \[tokens - 1, layers, experts per token\]"),
        (lambda e: e[:, :, :1], "sample 3: .* has shape"),
        (lambda e: e + 4, r"sample 3: .* of token 0 in layer 0 are \[\d, \d\]; expected different"),
        (lambda e: e * 0, r"are \[0, 0\]; expected different numbers from 0 to 3"),
    ],
)
def test_experts_that_do_not_fit_name_the_sample(
    change: Any, message: str, folders: dict[str, str], references: dict[str, RoutingReference]
) -> None:
    experts = list(references["qwen3_moe"].experts)
    experts[3] = change(experts[3])
    trainer = started(folders["qwen3_moe"], R3)
    with pytest.raises(DataError, match=message):
        trainer.log_probs(with_experts(batch(), experts), ModelTag.ACTOR)


def test_replay_without_a_recording_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(DataError, match="no log-prob pass has recorded"):
        started(folders["qwen3_moe"], R2).train_step(train_step(batch()), policy_gradient_loss)


def test_a_model_without_experts_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_tiny_qwen3(tmp_path_factory.mktemp("dense"), vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="mixtures of experts, and this model has none"):
        started(folder, R2)
