"""The loss of one micro-batch, put together from the flags."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from slime.config.config import Config
from slime.errors import ConfigError
from slime.training.algorithms.base import Algorithm, load_algorithm
from slime.training.importance import (
    ImportanceWeights,
    masked_importance_weights,
    truncated_importance_weights,
)
from slime.training.interface import LossFn, LossTerms, TokenView
from slime.training.kl import KlKind, kl_estimate
from slime.training.masked import masked_sum
from slime.training.policy_loss import ClipBounds, bounded_ratio, off_policy_sequence_mask
from slime.training.sft_loss import sft_loss

# The documented name of IcePop as a --custom-tis-function-path; it is built in here.
ICEPOP_PATH = "slime.backends.megatron_utils.loss.icepop_function"

# old log-probs, rollout log-probs -> weights
Correction = Callable[[Tensor, Tensor], ImportanceWeights]


@dataclass(frozen=True, kw_only=True)
class PolicyLossOptions:
    """What the policy loss consists of.

    Attributes:
        clip: bounds of the ratio.
        entropy_coef: weight of the entropy bonus.
        kl_loss_coef: weight of the KL to the reference in the loss; 0 = no reference needed.
        kl_kind: its estimator.
        unbiased_kl: weight the estimate by the ratio.
        correction: trainer/engine mismatch weights; None = none.
        opsm_delta: drift above which a bad response is masked; None = never.
        old_is_rollout: the engine's log-probs are the old ones.
    """

    clip: ClipBounds = field(default_factory=ClipBounds)
    entropy_coef: float = 0.0
    kl_loss_coef: float = 0.0
    kl_kind: KlKind = "k1"
    unbiased_kl: bool = False
    correction: Correction | None = None
    opsm_delta: float | None = None
    old_is_rollout: bool = False


def policy_loss_options(config: Config) -> PolicyLossOptions:
    """The options that the flags ask for.

    Raises:
        ConfigError: a custom function that the loss cannot call yet.
    """
    high = config.eps_clip if config.eps_clip_high is None else config.eps_clip_high
    return PolicyLossOptions(
        clip=ClipBounds(low=config.eps_clip, high=high, dual=config.eps_clip_c),
        entropy_coef=config.entropy_coef,
        kl_loss_coef=config.kl_loss_coef if config.use_kl_loss else 0.0,
        kl_kind=config.kl_loss_type,
        unbiased_kl=config.use_unbiased_kl,
        correction=_correction(config),
        opsm_delta=config.opsm_delta if config.use_opsm else None,
        old_is_rollout=config.use_rollout_logprobs,
    )


def make_loss_fn(config: Config) -> LossFn:
    """The loss that `--loss-type` and the flags around it describe.

    It reads these columns of the view, each [T]: `weight` (mask over the step's denominator; the
    loss and each metric are sums of weight x value), and for a policy loss also `loss_mask`,
    `advantages` and, where they exist, `old_log_probs` (the trainer's, from before the first step
    of the round), `ref_log_probs` and `rollout_log_probs`. Without `old_log_probs` the current
    ones, detached, stand for them.

    Raises:
        ConfigError: the flags ask for a loss that is not built.
    """
    if config.loss_type == "sft_loss":
        return sft_loss
    if config.loss_type != "policy_loss":
        raise ConfigError(
            f"--loss-type {config.loss_type} is not built; use policy_loss or sft_loss"
        )
    if config.custom_pg_loss_reducer_function_path is not None:
        raise ConfigError(
            "--custom-pg-loss-reducer-function-path is not built; for Dr. GRPO use "
            "--disable-grpo-std-normalization with --calculate-per-token-loss"
        )
    algorithm = load_algorithm(config.advantage_estimator)
    return partial(policy_loss, algorithm=algorithm, options=policy_loss_options(config))


def policy_loss(view: TokenView, *, algorithm: Algorithm, options: PolicyLossOptions) -> LossTerms:
    """Surrogate - entropy_coef x entropy + kl_loss_coef x KL, summed with the column `weight`.

    Returns:
        The loss and the metrics pg_loss, pg_clipfrac, ppo_kl, entropy_loss (the entropy itself),
        kl_loss, train_rollout_logprob_abs_diff, ois, tis, tis_clipfrac, tis_abs, opsm_clipfrac;
        those whose inputs are there.
    """
    weight = view.columns["weight"]
    trainer = view.columns.get("old_log_probs", view.log_probs.detach())
    old = view.columns["rollout_log_probs"] if options.old_is_rollout else trainer
    surrogate, values = _surrogate(view, old, algorithm, options)
    loss = pg_loss = masked_sum(surrogate, weight)
    if view.entropy is not None:
        values["entropy_loss"] = view.entropy
        if options.entropy_coef != 0.0:
            loss = loss - options.entropy_coef * masked_sum(view.entropy, weight)
    if options.kl_loss_coef != 0.0:
        kl = _kl_to_reference(view, old, options)
        values["kl_loss"] = kl
        loss = loss + options.kl_loss_coef * masked_sum(kl, weight)
    if "rollout_log_probs" in view.columns:
        gap = (trainer - view.columns["rollout_log_probs"]).abs()
        values["train_rollout_logprob_abs_diff"] = gap
    metrics = {name: masked_sum(v.detach().float(), weight) for name, v in values.items()}
    return LossTerms(loss, {"pg_loss": pg_loss.detach(), **metrics})


def _surrogate(
    view: TokenView, old: Tensor, algorithm: Algorithm, options: PolicyLossOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """([T] policy loss after all corrections, [T] values of its metrics)."""
    advantages = view.columns["advantages"]
    segments = (view.columns["loss_mask"], view.segments, view.segment_sum)
    log_ratio = algorithm.log_ratio(view.log_probs, old, *segments)
    surrogate = algorithm.policy_loss(view.log_probs, log_ratio, advantages, options.clip)
    per_token = surrogate.per_token
    values: dict[str, Tensor] = {"pg_clipfrac": surrogate.is_clipped, "ppo_kl": -log_ratio}
    if options.opsm_delta is not None:
        dropped = off_policy_sequence_mask(
            view.log_probs - old, advantages, *segments, delta=options.opsm_delta
        )
        per_token = torch.where(dropped, 0.0, per_token)
        values["opsm_clipfrac"] = dropped
    if options.correction is not None:
        correction = options.correction(old, view.columns["rollout_log_probs"])
        per_token = per_token * correction.weights
        values |= {
            "ois": bounded_ratio(log_ratio),
            "tis": correction.ratio,
            "tis_clipfrac": correction.is_clipped,
            "tis_abs": (correction.ratio - 1).abs(),
        }
    return per_token, values


def _kl_to_reference(view: TokenView, old: Tensor, options: PolicyLossOptions) -> Tensor:
    ratio = bounded_ratio(view.log_probs - old) if options.unbiased_kl else None
    return kl_estimate(
        view.log_probs, view.columns["ref_log_probs"], options.kl_kind, importance_ratio=ratio
    )


def _correction(config: Config) -> Correction | None:
    path = config.custom_tis_function_path
    if path not in (None, ICEPOP_PATH):
        raise ConfigError(
            f"--custom-tis-function-path {path}: own functions are not built yet; use --use-tis "
            f"alone, or {ICEPOP_PATH} for IcePop"
        )
    if not config.use_tis:
        return None
    kind = truncated_importance_weights if path is None else masked_importance_weights
    return partial(kind, low=config.tis_clip_low, high=config.tis_clip)
