"""One round of training on one rank: log-probs, advantages, optimizer steps."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from slime.config.config import Config
from slime.data.batch import Ragged, RolloutBatch
from slime.errors import ConfigError, DataError
from slime.observability.phases import Phase, phase
from slime.observability.profile import timer
from slime.observability.timeline import span
from slime.plugins import load_function
from slime.training.algorithms.base import AdvantageInputs, Algorithm, load_algorithm
from slime.training.interface import Metrics, ModelTag, Trainer, TrainStep
from slime.training.kl import kl_estimate
from slime.training.losses import make_loss_fn
from slime.training.masked import whiten
from slime.training.rollout_data import (
    RolloutData,
    check_rows,
    loss_columns,
    make_rollout_data,
    mean_metrics,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UpdateHooks:
    """User functions called during an update.

    Attributes:
        args: the flat namespace they receive.
        advantages: `fn(args, rollout_data)`, fills `advantages` and `returns` instead of the
            algorithm.
        rollout_data: `fn(args, rollout_id, rollout_data)`, may change any column in place.
    """

    args: Any = None
    advantages: Callable[[Any, RolloutData], None] | None = None
    rollout_data: Callable[[Any, int, RolloutData], None] | None = None

    @classmethod
    def from_config(cls, config: Config, args: Any) -> Self:
        """The functions that --custom-advantage-function-path and the like lead to.

        Raises:
            ConfigError: a path leads nowhere.
        """
        advantages = config.custom_advantage_function_path
        rollout_data = config.rollout_data_postprocess_path
        return cls(
            args=args,
            advantages=load_function(advantages) if advantages else None,
            rollout_data=load_function(rollout_data) if rollout_data else None,
        )


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """Metrics of one update, the same on all ranks, without their area (`train/`, `rollout/`).

    Attributes:
        step_metrics: one per optimizer step.
        rollout_metrics: means over the round, seen from the trainer.
    """

    step_metrics: list[Metrics]
    rollout_metrics: Metrics


_NO_HOOKS = UpdateHooks()


def run_update(
    trainer: Trainer,
    batch: RolloutBatch,
    config: Config,
    *,
    rollout_id: int,
    hooks: UpdateHooks = _NO_HOOKS,
) -> UpdateResult:
    """Train on one round: every rank calls this with its own batch.

    Raises:
        ConfigError: the flags ask for something that is not built.
        DataError: rollout log-probs are needed and missing, or a hook left a column unusable.
    """
    loss_fn = make_loss_fn(config, hooks.args)
    data = make_rollout_data(batch)
    if _uses_advantages(config):
        algorithm = _checked_algorithm(config, data)
        _add_log_probs(trainer, batch, config, hooks, data, algorithm)
        if not config.disable_compute_advantages_and_returns:
            with span("advantages"):
                _add_advantages(trainer, config, hooks, data, algorithm)
    if hooks.rollout_data is not None:
        hooks.rollout_data(hooks.args, rollout_id, data)
        check_rows(data, "--rollout-data-postprocess-path")
    columns = _checked_columns(batch, config, data)
    rollout_metrics = mean_metrics(batch, data, trainer.sum_over_dp)
    step_metrics: list[Metrics] = []
    with timer("actor_train"), phase(Phase.TRAIN):
        for step_id, plan in enumerate(batch.steps):
            step = TrainStep(
                batch=batch,
                plan=plan,
                columns=columns,
                needs_entropy=config.loss_type == "policy_loss",
                needs_logits=config.loss_type == "custom_loss",
                step_id=step_id,
            )
            with span("train_step"):
                metrics = trainer.train_step(step, loss_fn)
            step_metrics.append({**metrics, "global_batch_size": float(plan.num_rollouts)})
    return UpdateResult(step_metrics=step_metrics, rollout_metrics=rollout_metrics)


def _uses_advantages(config: Config) -> bool:
    """Whether log-probs of the round, and advantages unless forbidden, are made for the loss."""
    if config.loss_type == "custom_loss":  # one that needs none says so
        return not config.disable_compute_advantages_and_returns
    return config.loss_type == "policy_loss"


def needs_reference(config: Config) -> bool:
    """Whether the loss or the reward has a KL to the reference with a weight other than 0."""
    if not _uses_advantages(config):
        return False
    return config.kl_coef != 0.0 or (config.use_kl_loss and config.kl_loss_coef != 0.0)


def needs_old_log_probs(config: Config, num_steps: int, hooks: UpdateHooks = _NO_HOOKS) -> bool:
    """Whether the trainer's log-probs are computed before the first optimizer step.

    In the only step of a round they equal the current ones, so the loss takes those, detached, and
    a whole forward pass is saved; unless something else reads them.
    """
    if config.use_rollout_logprobs:
        return config.get_mismatch_metrics
    algorithm = load_algorithm(config.advantage_estimator)
    replays_own_experts = config.use_routing_replay and not config.use_rollout_routing_replay
    return (
        num_steps != 1
        or config.loss_type == "custom_loss"
        or config.kl_coef != 0.0
        or config.keep_old_actor
        or config.get_mismatch_metrics
        or config.use_opd
        or replays_own_experts
        or algorithm.needs_old_log_probs
        or algorithm.needs_values
        or hooks.advantages is not None
        or hooks.rollout_data is not None
    )


def _checked_algorithm(config: Config, data: RolloutData) -> Algorithm:
    algorithm = load_algorithm(config.advantage_estimator)
    if config.use_opd or algorithm.needs_values:
        raise ConfigError(
            "on-policy distillation and critics are not built yet: leave out --use-opd and "
            "--advantage-estimator ppo"
        )
    if config.kl_coef != 0.0 and not algorithm.shapes_rewards_by_kl:
        raise ConfigError(
            f"--kl-coef {config.kl_coef} has no effect with --advantage-estimator {algorithm.name}"
            "; use --use-kl-loss with --kl-loss-coef, or a reinforce_plus_plus estimator"
        )
    needs = config.use_tis or config.use_rollout_logprobs or config.get_mismatch_metrics
    if needs and "rollout_log_probs" not in data:
        raise DataError(
            "--use-tis, --use-rollout-logprobs and --get-mismatch-metrics need the engine's "
            "log-probs, but no sample has rollout_log_probs; the generate function has to request "
            "return_logprob and keep them"
        )
    return algorithm


@functools.cache
def _say_reference_is_skipped() -> None:
    logger.info(
        "--use-kl-loss with --kl-loss-coef 0: the loss does not depend on the reference model, so "
        "it is neither loaded nor run, and kl_loss is not reported"
    )


def _add_log_probs(
    trainer: Trainer,
    batch: RolloutBatch,
    config: Config,
    hooks: UpdateHooks,
    data: RolloutData,
    algorithm: Algorithm,
) -> None:
    """Columns log_probs, ref_log_probs and kl, those that are needed."""
    if needs_old_log_probs(config, len(batch.steps), hooks):
        model = ModelTag.OLD_ACTOR if config.keep_old_actor else ModelTag.ACTOR
        with timer("log_probs"), phase(Phase.LOG_PROBS):
            data["log_probs"] = trainer.log_probs(batch, model)
    if not needs_reference(config):
        if config.use_kl_loss:
            _say_reference_is_skipped()
        return
    with timer("ref_log_probs"), phase(Phase.LOG_PROBS):
        data["ref_log_probs"] = trainer.log_probs(batch, ModelTag.REF)
    old = data["rollout_log_probs"] if config.use_rollout_logprobs else data.get("log_probs")
    if old is not None:
        pairs = zip(old, data["ref_log_probs"], strict=True)
        data["kl"] = [kl_estimate(row, ref, config.kl_loss_type) for row, ref in pairs]


def _add_advantages(
    trainer: Trainer, config: Config, hooks: UpdateHooks, data: RolloutData, algorithm: Algorithm
) -> None:
    """Columns advantages and returns, whitened over all ranks where asked for."""
    if hooks.advantages is not None:
        hooks.advantages(hooks.args, data)
        check_rows(data, "--custom-advantage-function-path", required=("advantages", "returns"))
    else:
        inputs = AdvantageInputs(
            rewards=data["rewards"],
            loss_masks=data["loss_masks"],
            kl=data.get("kl") or _zero_rows(data["response_lengths"]),
            kl_coef=config.kl_coef,
            gamma=config.gamma,
        )
        result = algorithm.advantages(inputs)
        data["advantages"], data["returns"] = result.advantages, result.returns
    if config.normalize_advantages or algorithm.whitens_advantages:
        data["advantages"] = whiten(data["advantages"], data["loss_masks"], trainer.sum_over_dp)


def _zero_rows(lengths: Sequence[int]) -> list[Tensor]:
    return Ragged(torch.zeros(sum(lengths)), tuple(lengths)).rows()


def _checked_columns(
    batch: RolloutBatch, config: Config, data: RolloutData
) -> dict[str, list[Tensor]]:
    if config.loss_type == "policy_loss" and "advantages" not in data:
        raise ConfigError(
            "--loss-type policy_loss needs advantages: leave out "
            "--disable-compute-advantages-and-returns, or fill them in the function of "
            "--rollout-data-postprocess-path"
        )
    return loss_columns(
        batch,
        data,
        per_token=config.calculate_per_token_loss,
        is_custom=config.loss_type == "custom_loss",
    )
