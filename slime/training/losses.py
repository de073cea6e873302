"""The loss of one micro-batch, put together from the flags."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slime.config.config import Config
from slime.errors import ConfigError
from slime.plugins import load_function
from slime.training.algorithms.base import Algorithm, load_algorithm
from slime.training.custom_loss import OwnCorrection, OwnReducer, custom_loss
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
        own_correction: the user's function in its place.
        only_measures: report what the own correction measures and leave the loss as it is.
        own_reducer: the user's function that sums the surrogate; None = with the column `weight`.
        opsm_delta: drift above which a bad response is masked; None = never.
        old_is_rollout: the engine's log-probs are the old ones.
    """

    clip: ClipBounds = field(default_factory=ClipBounds)
    entropy_coef: float = 0.0
    kl_loss_coef: float = 0.0
    kl_kind: KlKind = "k1"
    unbiased_kl: bool = False
    correction: Correction | None = None
    own_correction: OwnCorrection | None = None
    only_measures: bool = False
    own_reducer: OwnReducer | None = None
    opsm_delta: float | None = None
    old_is_rollout: bool = False


def policy_loss_options(config: Config, args: Any = None) -> PolicyLossOptions:
    """The options that the flags ask for; `args` is what users' functions receive.

    Raises:
        ConfigError: a path of a function leads nowhere.
    """
    high = config.eps_clip if config.eps_clip_high is None else config.eps_clip_high
    return PolicyLossOptions(
        clip=ClipBounds(low=config.eps_clip, high=high, dual=config.eps_clip_c),
        entropy_coef=config.entropy_coef,
        kl_loss_coef=config.kl_loss_coef if config.use_kl_loss else 0.0,
        kl_kind=config.kl_loss_type,
        unbiased_kl=config.use_unbiased_kl,
        correction=_correction(config),
        own_correction=_own_correction(config, args),
        only_measures=not config.use_tis,
        own_reducer=_own_reducer(config),
        opsm_delta=config.opsm_delta if config.use_opsm else None,
        old_is_rollout=config.use_rollout_logprobs,
    )


def make_loss_fn(config: Config, args: Any = None) -> LossFn:
    """The loss that `--loss-type` and the flags around it describe.

    Args:
        args: the flat namespace that users' functions receive.

    It reads these columns of the view, each [T]: `weight` (mask over the step's denominator; the
    loss and each metric are sums of weight x value), and for a policy loss also `loss_mask`,
    `advantages` and, where they exist, `old_log_probs` (the trainer's, from before the first step
    of the round), `ref_log_probs` and `rollout_log_probs`. Without `old_log_probs` the current
    ones, detached, stand for them.

    Raises:
        ConfigError: a path of a user's function is missing or leads nowhere.
    """
    if config.loss_type == "sft_loss":
        return sft_loss
    if config.loss_type == "custom_loss":
        if config.custom_loss_function_path is None:
            raise ConfigError("--loss-type custom_loss needs --custom-loss-function-path.")
        return partial(
            custom_loss,
            function=load_function(config.custom_loss_function_path),
            args=args,
            per_token=config.calculate_per_token_loss,
            recomputes=config.recompute_loss_function,
        )
    algorithm = load_algorithm(config.advantage_estimator)
    return partial(policy_loss, algorithm=algorithm, options=policy_loss_options(config, args))


def policy_loss(view: TokenView, *, algorithm: Algorithm, options: PolicyLossOptions) -> LossTerms:
    """Surrogate - entropy_coef x entropy + kl_loss_coef x KL, summed with the column `weight`.

    Returns:
        The loss and the metrics pg_loss, pg_clipfrac, ppo_kl, entropy_loss (the entropy itself),
        kl_loss, train_rollout_logprob_abs_diff, ois, tis, tis_clipfrac, tis_abs, opsm_clipfrac;
        those whose inputs are there, and what an own correction reports. Tokens that it drops are
        in none of them, unless it only measures.
    """
    weight = view.columns["weight"]
    trainer = view.columns.get("old_log_probs", view.log_probs.detach())
    old = view.columns["rollout_log_probs"] if options.old_is_rollout else trainer
    surrogate, values = _surrogate(view, old, algorithm, options)
    masks: list[Tensor] | None = None
    if options.own_correction is not None:
        corrected = options.own_correction(view, surrogate, trainer)
        if not options.only_measures:
            surrogate, masks = corrected.per_token, corrected.masks
            weight = weight * corrected.kept
        values |= {"ois": bounded_ratio(-values["ppo_kl"]), **corrected.metrics}
    if options.own_reducer is None:
        loss = pg_loss = masked_sum(surrogate, weight)
    else:
        loss = pg_loss = options.own_reducer(view, surrogate, masks)
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
    if not config.use_tis or config.custom_tis_function_path not in (None, ICEPOP_PATH):
        return None
    is_icepop = config.custom_tis_function_path == ICEPOP_PATH
    kind = masked_importance_weights if is_icepop else truncated_importance_weights
    return partial(kind, low=config.tis_clip_low, high=config.tis_clip)


def _own_correction(config: Config, args: Any) -> OwnCorrection | None:
    path = config.custom_tis_function_path
    is_asked = config.use_tis or config.get_mismatch_metrics
    if not is_asked or path is None or path == ICEPOP_PATH:
        return None
    return OwnCorrection(function=load_function(path), args=args)


def _own_reducer(config: Config) -> OwnReducer | None:
    path = config.custom_pg_loss_reducer_function_path
    if path is None:
        return None
    return OwnReducer(function=load_function(path), per_token=config.calculate_per_token_loss)
