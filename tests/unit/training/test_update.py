"""run_update: which passes run, what hooks see, and that it learns."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.fake_trainer import FakeTrainer
from support.rollouts import random_samples

from slime.config.config import Config
from slime.data.batch import RolloutBatch
from slime.errors import ConfigError, DataError
from slime.training import update
from slime.training.batching import make_rollout_batches
from slime.training.rewards import post_process_rewards
from slime.training.update import (
    UpdateHooks,
    UpdateResult,
    needs_old_log_probs,
    needs_reference,
    run_update,
)

ONE_STEP = Config(n_samples_per_prompt=4, global_batch_size=8)


def batch_for(config: Config, *, rollout_log_probs: bool = True) -> RolloutBatch:
    samples = random_samples(num_groups=2, group_size=4, seed=2, mask_probability=0.2)
    if not rollout_log_probs:
        for sample in samples:
            sample.rollout_log_probs = None
    raw, rewards = post_process_rewards(samples, config)
    (batch,) = make_rollout_batches(samples, rewards, raw, config, rollout_id=0, dp_size=1)
    return batch


def run(
    config: Config, trainer: FakeTrainer | None = None, hooks: UpdateHooks | None = None
) -> tuple[UpdateResult, FakeTrainer]:
    trainer = trainer or FakeTrainer()
    result = run_update(
        trainer, batch_for(config), config, rollout_id=0, hooks=hooks or UpdateHooks()
    )
    return result, trainer


def test_single_step_skips_the_log_prob_pass() -> None:
    result, trainer = run(ONE_STEP)
    assert trainer.calls == ["train_step"]
    (metrics,) = result.step_metrics
    assert metrics["ppo_kl"] == 0.0
    assert metrics["global_batch_size"] == 8
    assert metrics["train_rollout_logprob_abs_diff"] > 0
    assert "log_probs" not in result.rollout_metrics


@pytest.mark.parametrize(
    "change",
    [
        {"global_batch_size": 4},
        {"keep_old_actor": True},
        {"use_routing_replay": True},
    ],
)
def test_log_prob_pass_runs_when_something_reads_it(change: dict[str, Any]) -> None:
    config = replace(ONE_STEP, **change)
    result, trainer = run(config)
    model = "old_actor" if config.keep_old_actor else "actor"
    assert trainer.calls[0] == f"log_probs:{model}"
    assert result.rollout_metrics["log_probs"] < 0
    assert len(result.step_metrics) == 8 // (config.global_batch_size or 1)


def test_first_of_two_steps_starts_on_policy_and_the_second_does_not() -> None:
    result, _ = run(replace(ONE_STEP, global_batch_size=4))
    first, second = result.step_metrics
    assert abs(first["ppo_kl"]) < 1e-6  # old log-probs were rounded to fp32
    assert abs(second["ppo_kl"]) > 1e-4


def test_skipped_and_recomputed_old_log_probs_give_the_same_step() -> None:
    seen: list[list[str]] = []
    hooks = UpdateHooks(rollout_data=lambda _args, _id, data: seen.append(sorted(data)))
    skipped, first = run(ONE_STEP)
    computed, second = run(ONE_STEP, hooks=hooks)
    assert second.calls == ["log_probs:actor", "train_step"]
    assert {"advantages", "returns", "log_probs", "loss_masks", "tokens"} <= set(seen[0])
    torch.testing.assert_close(first.gradient, second.gradient, rtol=1e-6, atol=1e-7)
    assert skipped.step_metrics[0]["loss"] == pytest.approx(
        computed.step_metrics[0]["loss"], abs=1e-7
    )


def test_reference_runs_only_with_a_weight(caplog: pytest.LogCaptureFixture) -> None:
    update._say_reference_is_skipped.cache_clear()  # pyright: ignore[reportPrivateUsage]
    free = replace(ONE_STEP, use_kl_loss=True, kl_loss_coef=0.0)
    assert not needs_reference(free)
    with caplog.at_level(logging.INFO):
        run(free)
        _, trainer = run(free)
    assert trainer.calls == ["train_step"]
    assert caplog.text.count("--kl-loss-coef 0") == 1
    weighted = replace(free, kl_loss_coef=0.1, kl_loss_type="low_var_kl")
    assert needs_reference(weighted)
    result, trainer = run(weighted)
    assert trainer.calls == ["log_probs:ref", "train_step"]
    assert result.step_metrics[0]["kl_loss"] > 0
    assert result.rollout_metrics["ref_log_probs"] < 0


def test_needs_old_log_probs_follows_the_rules() -> None:
    assert not needs_old_log_probs(ONE_STEP, 1)
    assert needs_old_log_probs(ONE_STEP, 2)
    assert not needs_old_log_probs(replace(ONE_STEP, use_rollout_logprobs=True), 2)
    assert needs_old_log_probs(replace(ONE_STEP, kl_coef=0.1), 1)
    assert needs_old_log_probs(replace(ONE_STEP, use_opd=True), 1)
    replayed = replace(ONE_STEP, use_routing_replay=True, use_rollout_routing_replay=True)
    assert not needs_old_log_probs(replayed, 1)


def test_kl_in_the_reward_needs_both_passes_and_shapes_the_returns() -> None:
    plain = replace(ONE_STEP, advantage_estimator="reinforce_plus_plus")
    shaped = replace(plain, kl_coef=0.1)
    result, trainer = run(shaped)
    assert trainer.calls == ["log_probs:actor", "log_probs:ref", "train_step"]
    assert result.rollout_metrics["kl"] != 0.0
    assert result.rollout_metrics["returns"] != run(plain)[0].rollout_metrics["returns"]


def test_rollout_log_probs_replace_the_pass() -> None:
    result, trainer = run(replace(ONE_STEP, global_batch_size=4, use_rollout_logprobs=True))
    assert trainer.calls == ["train_step"] * 2
    assert result.step_metrics[0]["ppo_kl"] != 0.0


@pytest.mark.parametrize("flag", ["use_tis", "use_rollout_logprobs"])
def test_missing_rollout_log_probs_are_named(flag: str) -> None:
    config = replace(ONE_STEP, **{flag: True})
    batch = batch_for(config, rollout_log_probs=False)
    with pytest.raises(DataError, match="rollout_log_probs"):
        run_update(FakeTrainer(), batch, config, rollout_id=0)


def test_custom_advantages_replace_the_algorithm() -> None:
    def fill(args: Any, data: dict[str, Any]) -> None:
        assert args == "args"
        data["advantages"] = [torch.zeros_like(mask) for mask in data["loss_masks"]]
        data["returns"] = data["advantages"]

    result, trainer = run(ONE_STEP, hooks=UpdateHooks(args="args", advantages=fill))
    assert result.rollout_metrics["advantages"] == 0.0
    assert trainer.gradient.abs().max() == 0


def test_data_hook_may_narrow_the_masks() -> None:
    def drop(_args: Any, rollout_id: int, data: dict[str, Any]) -> None:
        assert rollout_id == 0
        data["loss_masks"] = [torch.zeros_like(mask) for mask in data["loss_masks"]]

    _, trainer = run(ONE_STEP, hooks=UpdateHooks(rollout_data=drop))
    assert trainer.gradient.abs().max() == 0


def test_hooks_load_from_their_paths() -> None:
    config = replace(ONE_STEP, custom_advantage_function_path="math.sqrt")
    hooks = UpdateHooks.from_config(config, "args")
    assert hooks.advantages is not None
    assert hooks.rollout_data is None


def test_whitened_advantages_have_mean_zero_over_tokens() -> None:
    seen: list[Any] = []
    hooks = UpdateHooks(rollout_data=lambda _args, _id, data: seen.append(data))
    run(replace(ONE_STEP, normalize_advantages=True), hooks=hooks)
    mask = torch.cat(seen[0]["loss_masks"]) == 1
    advantages = torch.cat(seen[0]["advantages"])[mask]
    assert advantages.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert advantages.std().item() == pytest.approx(1.0, abs=1e-5)


def test_sft_needs_no_log_prob_pass_and_learns_its_data() -> None:
    config = replace(ONE_STEP, loss_type="sft_loss", disable_compute_advantages_and_returns=True)
    trainer = FakeTrainer()
    losses = [run(config, trainer)[0].step_metrics[0]["loss"] for _ in range(10)]
    assert trainer.calls == ["train_step"] * 10
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.2


def test_policy_loss_raises_good_and_lowers_bad_responses() -> None:
    config = replace(ONE_STEP, disable_grpo_std_normalization=True)
    trainer, batch = FakeTrainer(learning_rate=1.0), batch_for(ONE_STEP)

    def objective() -> float:
        rows = trainer.log_probs(batch, update.ModelTag.ACTOR)
        masks = batch.loss_masks.rows()
        pairs = zip(batch.rewards, rows, masks, strict=True)
        return sum(r * float((lp * m).sum()) / max(float(m.sum()), 1.0) for r, lp, m in pairs)

    before = objective()
    for _ in range(5):
        run(config, trainer)
    assert objective() > before + 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_coef": 0.1}, "--kl-coef"),
        ({"use_opd": True}, "--use-opd"),
        ({"disable_compute_advantages_and_returns": True}, "needs advantages"),
    ],
)
def test_flags_without_effect_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(replace(ONE_STEP, **change))
