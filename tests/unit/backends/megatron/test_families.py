"""Every family in the trainer against transformers: log-probs, one optimizer step, recomputation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import user_losses
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
from support.tiny_families import make_tiny_family

from slime.data.batch import Ragged, RolloutBatch
from slime.errors import ConfigError
from slime.training.interface import ModelTag
from slime.training.update import UpdateHooks, run_update

pytestmark = pytest.mark.trainer

VOCAB = 106  # no multiple of 8: the embedding is padded

_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
# Name of the case -> model_type, keys of config.json that differ from the small model's.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "glm4": ("glm4", {}),
    "olmo2": ("olmo2", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "glm4_moe": ("glm4_moe", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    # Values narrower than queries, as in all published ones; pairs that YaRN stretches.
    "deepseek_v3_yarn": (
        "deepseek_v3",
        {"rope_scaling": _YARN, "v_head_dim": 12, "qk_rope_head_dim": 16},
    ),
    "deepseek_v3_no_q_lora": ("deepseek_v3", {"q_lora_rank": None}),
}
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

_TP2 = "--actor-num-gpus-per-node 2 --tensor-model-parallel-size 2"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("families")
    return {
        name: make_tiny_family(folder / name, model_type, vocab_size=VOCAB, **changes)
        for name, (model_type, changes) in CASES.items()
    }


@pytest.fixture(scope="module")
def references(folders: dict[str, str]) -> dict[str, Reference]:
    return {name: reference_run(folder, [batch(1)]) for name, folder in folders.items()}


def batch(seed: int, num_samples: int = 6) -> RolloutBatch:
    return random_batch(num_samples=num_samples, vocab_size=VOCAB, seed=seed)


def started(model: str, *words: str) -> Any:
    trainer = start_trainer(trainer_config(model, *words))
    trainer.load()
    return trainer


def assert_step_agrees(trainer: Any, reference: Reference) -> None:
    metrics = trainer.train_step(train_step(batch(1)), policy_gradient_loss)
    assert metrics["loss"] == pytest.approx(reference.losses[0], abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(reference.grad_norms[0], rel=1e-5)
    trained = weights_of(trainer)
    for name, tensor in per_expert(reference.weights).items():
        torch.testing.assert_close(trained[name], tensor, rtol=0.0, atol=2e-5, msg=name)


def per_expert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that transformers stacks over experts in memory, under their names on disk."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for i, both in enumerate(tensor):
                gate, up = both.chunk(2)
                result[f"{stem}.{i}.gate_proj.weight"] = gate
                result[f"{stem}.{i}.up_proj.weight"] = up
        elif last == "down_proj":
            result |= {f"{stem}.{i}.down_proj.weight": one for i, one in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


@pytest.mark.parametrize("case", CASES)
def test_log_probs_equal_those_of_transformers(case: str, folders: dict[str, str]) -> None:
    data = batch(0)
    ours = started(folders[case]).log_probs(data, ModelTag.ACTOR)
    theirs = hf_log_probs(hf_model(folders[case]), data)
    for row, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(row, reference, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, folders: dict[str, str]) -> None:
    own = ("--loss-type", "custom_loss", "--custom-loss-function-path", "support.user_losses.nll")
    config = trainer_config(folders[case], *own)
    trainer = start_trainer(config)
    trainer.load()
    run_update(trainer, batch(0), config, rollout_id=0, hooks=UpdateHooks(args=None))
    seen, model = user_losses.SEEN, hf_model(folders[case])
    with torch.no_grad():
        theirs = [model(row[None]).logits[0] for row in seen["batch"]["unconcat_tokens"]]
    ours = seen["logits"][0, : sum(map(len, theirs))].detach()  # a card pads the pack
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_that_of_transformers_and_adamw(
    case: str, folders: dict[str, str], references: dict[str, Reference]
) -> None:
    assert_step_agrees(started(folders[case]), references[case])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("glm4", _FULL),
        ("olmo2", _FULL),
        ("glm4_moe", _FULL),
        ("deepseek_v3", _FULL),
        ("glm4", "--recompute-granularity selective --recompute-modules core_attn mlp"),
        (
            "deepseek_v3_yarn",
            "--recompute-granularity selective --recompute-modules core_attn moe",
        ),
        (
            "glm4_moe",
            "--recompute-granularity selective --recompute-modules mlp shared_experts",
        ),
    ],
)
def test_recomputing_changes_nothing(
    case: str, words: str, folders: dict[str, str], references: dict[str, Reference]
) -> None:
    assert_step_agrees(started(folders[case], *words.split()), references[case])


def test_a_pack_without_any_response_passes_through_experts(folders: dict[str, str]) -> None:
    no_masks = Ragged.from_rows([torch.empty(0)], torch.float32)
    failed = replace(batch(1, num_samples=1), response_lengths=(0,), loss_masks=no_masks)
    (row,) = started(folders["qwen3_moe"]).log_probs(failed, ModelTag.ACTOR)
    assert row.shape == (0,)


@pytest.mark.parametrize("case", ["glm4", "olmo2", "glm4_moe", "deepseek_v3"])
def test_resumed_run_continues_bit_for_bit(
    case: str, folders: dict[str, str], tmp_path: Path
) -> None:
    words = ("--save", str(tmp_path), "--save-interval", "1")
    first = started(folders[case], *words)
    first.train_step(train_step(batch(1)), policy_gradient_loss)
    first.save(0)
    expected = first.train_step(train_step(batch(2)), policy_gradient_loss)

    resumed = started(folders[case], *words, "--load", str(tmp_path))
    assert resumed.train_step(train_step(batch(2)), policy_gradient_loss) == expected
    trained = weights_of(resumed)
    assert [n for n, w in weights_of(first).items() if not torch.equal(w, trained[n])] == []


def test_the_bias_that_balances_experts_moves_only_when_asked_to(folders: dict[str, str]) -> None:
    def biases(*words: str) -> tuple[torch.Tensor, torch.Tensor]:
        trainer = started(folders["glm4_moe"], *words)
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        before = weights_of(trainer)[name]
        trainer.train_step(train_step(batch(1)), policy_gradient_loss)
        return before, weights_of(trainer)[name]

    torch.testing.assert_close(*biases(), rtol=0.0, atol=0.0)
    before, after = biases("--moe-router-bias-update-rate", "0.01")
    assert (after - before).abs().max() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("case", "words", "message"),
    [
        (
            "qwen3_moe",
            "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01",
            "--moe-aux-loss-coeff 0.01",
        ),
        ("qwen3_moe", "--moe-router-load-balancing-type sinkhorn", "sinkhorn"),
        ("qwen3_moe", _TP2, "experts .* --sequence-parallel"),
        ("deepseek_v3", _TP2, "attention .* --sequence-parallel"),
        (
            "qwen3",
            "--recompute-granularity selective --recompute-modules layernorm",
            "--recompute-modules layernorm",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    case: str, words: str, message: str, folders: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        start_trainer(trainer_config(folders[case], *words.split()))
