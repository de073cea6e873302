"""The trainer in bf16 on one card: near fp32, the same bits twice, asleep and with a host's Adam."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import deterministic_run
from support.device import worker_environment
from support.megatron_runs import (
    hf_log_probs,
    hf_model,
    make_tiny_qwen3,
    policy_gradient_loss,
    random_batch,
    reference_run,
    start_trainer,
    train_step,
    trainer_config,
    weights_of,
)
from support.tiny_families import FAMILIES, make_tiny_family

from slime.training.interface import ModelTag

pytestmark = pytest.mark.gpu1

VOCAB = 106
BF16 = ("--device", "cuda", "--bf16")
HOST = ("--optimizer-cpu-offload", "--use-precision-aware-optimizer")
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# Values narrower than queries, as in all published ones.
_NARROW = {"v_head_dim": 8, "qk_rope_head_dim": 16}


def started(folder: Path | str, *words: str) -> Any:
    trainer = start_trainer(trainer_config(folder, *BF16, *words))
    trainer.load()
    return trainer


def batch(seed: int) -> Any:
    return random_batch(num_samples=8, vocab_size=VOCAB, seed=seed, longest=300)


def steps(trainer: Any, *seeds: int) -> list[dict[str, float]]:
    return [trainer.train_step(train_step(batch(seed)), policy_gradient_loss) for seed in seeds]


def assert_equal_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_bf16_is_near_that_of_transformers_in_fp32(family: str, tmp_path: Path) -> None:
    changes = _NARROW if family == "deepseek_v3" else {}
    folder = make_tiny_family(tmp_path, family, vocab_size=VOCAB, **changes)
    trainer = started(folder)
    assert next(trainer._bare[0].parameters()).dtype == torch.bfloat16
    rows = trainer.log_probs(batch(0), ModelTag.ACTOR)
    expected = hf_log_probs(hf_model(folder), batch(0))
    gaps = torch.cat([(a - b).abs() for a, b in zip(rows, expected, strict=True)])
    # A token whose two best experts are nearly equal goes elsewhere in bf16: hence the mean.
    assert gaps.mean() < 0.05
    metrics, reference = steps(trainer, 1)[0], reference_run(folder, [batch(1)])
    assert metrics["loss"] == pytest.approx(reference.losses[0], rel=0.03, abs=0.01)
    assert metrics["grad_norm"] == pytest.approx(reference.grad_norms[0], rel=0.05)


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_two_processes_give_the_same_bits(family: str, tmp_path: Path) -> None:
    folder = make_tiny_family(tmp_path / "model", family, vocab_size=deterministic_run.VOCAB)
    outs = [tmp_path / f"{number}.pt" for number in range(2)]
    command = [sys.executable, deterministic_run.__file__, folder]
    runs = [subprocess.Popen([*command, str(out), *BF16], env=worker_environment()) for out in outs]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    first, second = (torch.load(out, weights_only=False) for out in outs)
    assert first["metrics"] == second["metrics"]
    assert_equal_weights(first["weights"], second["weights"])


def test_recomputing_changes_no_bit(tmp_path: Path) -> None:
    folder = make_tiny_family(tmp_path, "qwen3_moe", vocab_size=VOCAB)
    plain, again = (
        started(folder, "--deterministic-mode", *words) for words in ((), _FULL.split())
    )
    assert steps(plain, 1, 2) == steps(again, 1, 2)
    assert_equal_weights(weights_of(plain), weights_of(again))


def wide_model(folder: Path) -> str:
    """0.14 G parameters: the pieces of a host's optimizer are several, and memory is visible."""
    return make_tiny_qwen3(
        folder,
        vocab_size=8 * 4096,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
    )


@pytest.mark.parametrize("fraction", ["1.0", "0.4"])
def test_an_optimizer_on_the_host_gives_the_bits_of_one_on_the_card(
    tmp_path: Path, fraction: str
) -> None:
    folder = wide_model(tmp_path / "model")
    words = ("--deterministic-mode", "--save", str(tmp_path / "save"), "--save-interval", "1")
    usual = started(folder, "--deterministic-mode")
    expected = steps(usual, 1, 2, 3)
    weights = weights_of(usual)
    del usual
    gc.collect()
    hosted = started(folder, *words, *HOST, "--optimizer-offload-fraction", fraction)
    assert steps(hosted, 1, 2) == expected[:2]
    hosted.save(0)
    assert steps(hosted, 3) == expected[2:]
    assert_equal_weights(weights_of(hosted), weights)
    resumed = started(folder, "--deterministic-mode", "--load", str(tmp_path / "save"))
    assert steps(resumed, 3) == expected[2:]
    assert_equal_weights(weights_of(resumed), weights)


@pytest.mark.parametrize("words", [(), HOST], ids=["card", "host"])
def test_a_sleeping_trainer_leaves_the_card_and_comes_back_bit_for_bit(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    folder = wide_model(tmp_path / "model")
    awake = started(folder, "--deterministic-mode", *words)
    expected = steps(awake, 1, 2, 3)
    weights = weights_of(awake)
    awake.close()
    del awake
    gc.collect()
    before = torch.cuda.memory_allocated()
    trainer = started(folder, "--deterministic-mode", *words)
    found = steps(trainer, 1)
    for seed in (2, 3):
        held = torch.cuda.memory_allocated() - before
        trainer.sleep()
        left = torch.cuda.memory_allocated() - before
        assert left < 0.01 * held, f"{left} of {held} bytes are left"
        trainer.wake_up()
        found += steps(trainer, seed)
    assert found == expected
    assert_equal_weights(weights_of(trainer), weights)


def test_an_update_in_bf16_learns(tmp_path: Path) -> None:
    """Twenty steps on one batch lower its loss: gradients reach the weights that compute."""
    folder = make_tiny_family(tmp_path, "glm4_moe", vocab_size=VOCAB)
    trainer = started(folder, "--lr", "3e-3")
    losses = [m["loss"] for m in steps(trainer, *[1] * 20)]
    assert losses[-1] < losses[0] - 0.1, json.dumps(losses)
