"""Packing, micro-batch size, data- and context-parallel size change neither loss nor gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.fake_trainer import FakeTrainer, VirtualGroup, run_ranks
from support.rollouts import random_samples

from slime.config.config import Config
from slime.data.sample import Sample
from slime.training.batching import make_rollout_batches
from slime.training.interface import Metrics
from slime.training.rewards import post_process_rewards
from slime.training.update import UpdateResult, run_update

BASE = Config(
    n_samples_per_prompt=4,
    global_batch_size=6,
    use_kl_loss=True,
    kl_loss_coef=0.1,
    kl_loss_type="low_var_kl",
    entropy_coef=0.01,
    use_tis=True,
    normalize_advantages=True,
)
CUTS: dict[str, dict[str, Any]] = {
    "larger micro-batches": {"micro_batch_size": 5},
    "packed": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 30},
    "tightly packed": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 9},
    "balanced": {
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 30,
        "balance_data": True,
        "balance_by_flops": True,
    },
}


def samples_with_everything() -> list[Sample]:
    """Fan-outs, masked tokens, removed samples."""
    return random_samples(
        num_groups=3,
        group_size=4,
        seed=9,
        max_fan_out=3,
        mask_probability=0.25,
        removed_probability=0.1,
    )


def train(config: Config, *, dp_size: int = 1, cp_size: int = 1) -> tuple[UpdateResult, Any]:
    """Two optimizer steps; metrics of rank 0, and the weights of every rank."""
    samples = samples_with_everything()
    raw, rewards = post_process_rewards(samples, config)
    batches = make_rollout_batches(
        samples, rewards, raw, config, rollout_id=0, dp_size=dp_size, cp_size=cp_size
    )

    def on_rank(rank: int, group: VirtualGroup) -> tuple[UpdateResult, torch.Tensor]:
        trainer = FakeTrainer(cp_size=cp_size, dp_rank=rank, dp_group=group, temperature=0.8)
        result = run_update(trainer, batches[rank], config, rollout_id=0)
        weights = torch.cat([weight.flatten() for _, weight in trainer.named_weights()])
        return result, torch.cat([weights, trainer.gradient])

    results = run_ranks(dp_size, on_rank)
    for result, state in results:
        assert result.step_metrics == results[0][0].step_metrics
        assert torch.equal(state, results[0][1])
    return results[0]


def assert_same(found: tuple[UpdateResult, Any], expected: tuple[UpdateResult, Any]) -> None:
    def close(a: Metrics, b: Metrics) -> None:
        # Columns are fp32: sums over other cuts round differently in their last digits.
        assert a == pytest.approx(b, rel=2e-5, abs=1e-6)

    for a, b in zip(found[0].step_metrics, expected[0].step_metrics, strict=True):
        close(a, b)
    close(found[0].rollout_metrics, expected[0].rollout_metrics)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_cut_does_not_matter(name: str, dp_size: int, per_token: bool) -> None:
    base = replace(BASE, calculate_per_token_loss=per_token)
    expected = train(base)
    assert len(expected[0].step_metrics) == 2
    assert_same(train(replace(base, **CUTS[name]), dp_size=dp_size), expected)


@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.parametrize(
    "change",
    [{}, {"advantage_estimator": "gspo"}, {"use_opsm": True, "opsm_delta": 1e-3}],
    ids=["grpo", "gspo", "opsm"],
)
def test_context_parallel_size_does_not_matter(cp_size: int, change: dict[str, Any]) -> None:
    config = replace(BASE, micro_batch_size=3, **change)
    assert_same(train(config, cp_size=cp_size), train(config))


def test_opsm_case_above_drops_some_bad_sequences_and_keeps_others() -> None:
    """Else it would not notice a drift that is summed over a part of the response."""
    some, every = (
        train(replace(BASE, use_opsm=True, opsm_delta=delta))[0].step_metrics[1]["opsm_clipfrac"]
        for delta in (1e-3, -100.0)
    )
    assert 0 < some < every


@pytest.mark.parametrize("name", CUTS)
def test_gspo_is_invariant_too(name: str) -> None:
    config = replace(BASE, advantage_estimator="gspo")
    assert_same(train(replace(config, **CUTS[name]), dp_size=2), train(config))


@pytest.mark.parametrize("dp_size", [2, 5])
def test_more_ranks_than_fit_are_filled_up(dp_size: int) -> None:
    config = replace(BASE, global_batch_size=12, micro_batch_size=2)
    assert_same(train(config, dp_size=dp_size), train(config))


def test_sft_loss_is_invariant_too() -> None:
    config = replace(BASE, loss_type="sft_loss", calculate_per_token_loss=True)
    expected = train(config)
    for name in CUTS:
        assert_same(train(replace(config, **CUTS[name]), dp_size=2), expected)
