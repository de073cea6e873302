"""Policy-gradient surrogates, one value per token: PPO and dual clip, CISPO; GSPO's ratio."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slime.training.masked import segment_mean

_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class ClipBounds:
    """The ratio is held in [1 - low, 1 + high]; `dual`, if set, bounds the loss of bad actions."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """A loss that is not reduced: the caller owns the denominator.

    Attributes:
        per_token: [T], carries the gradient.
        is_clipped: [T] bool, where the clip changed the loss.
    """

    per_token: Tensor
    is_clipped: Tensor


def bounded_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), held in [e^-20, e^20].

    One stale token at e^90 would be inf, and inf x 0 a NaN gradient for the whole step.
    """
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def token_log_ratio(
    log_probs: Tensor,
    old_log_probs: Tensor,
    mask: Tensor,
    segments: Tensor,
    segment_sum: Callable[[Tensor], Tensor],
) -> Tensor:
    """[T] log_probs - old_log_probs: PPO's ratio, one per token. The last three are not needed."""
    return log_probs - old_log_probs


def sequence_log_ratio(
    log_probs: Tensor,
    old_log_probs: Tensor,
    mask: Tensor,
    segments: Tensor,
    segment_sum: Callable[[Tensor], Tensor],
) -> Tensor:
    """[T] mean of log_probs - old_log_probs over the trainable tokens of each token's response.

    The gradient flows to all tokens of the response.

    Source: Zheng et al. 2025 (GSPO), arXiv:2507.18071, eq. 7.
    """
    return segment_mean(log_probs - old_log_probs, mask, segments, segment_sum)


def clipped_policy_loss(
    log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, clip: ClipBounds
) -> PolicyLoss:
    """PPO's clipped surrogate, one value per response token.

    Args:
        log_probs: [T]; not needed, it stands here so that all surrogates are called alike.
        log_ratio: [T] of a token or of its whole sequence; carries the gradient.
        advantages: [T] no gradient.
        clip: with `dual` = c, a token of negative advantage loses at most -c x advantage.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; two bounds as in DAPO, arXiv:2503.14476,
    section 3.1; dual clip as in Ye et al. 2020, arXiv:1912.09729.
    """
    ratio = bounded_ratio(log_ratio)
    free = -ratio * advantages
    held = -ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    loss = torch.maximum(free, held)
    if clip.dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -clip.dual * advantages), loss)
    return PolicyLoss(loss, held > free)


def cispo_policy_loss(
    log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, clip: ClipBounds
) -> PolicyLoss:
    """REINFORCE with a clipped, detached importance weight: every token keeps its gradient.

    Args:
        log_probs: [T] carries the gradient.
        log_ratio: [T] its gradient is cut here.
        advantages: [T] no gradient.
        clip: bounds of the weight; the paper leaves the lower side open (low = 1).

    Source: MiniMax-M1, arXiv:2506.13585, eqs. 4-5.
    """
    ratio = bounded_ratio(log_ratio.detach())
    weight = ratio.clamp(1 - clip.low, 1 + clip.high)
    return PolicyLoss(-weight * advantages * log_probs, weight != ratio)


def off_policy_sequence_mask(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    segments: Tensor,
    segment_sum: Callable[[Tensor], Tensor],
    *,
    delta: float,
) -> Tensor:
    """[T] bool, True for tokens to drop: negative advantage in a response that drifted off-policy.

    Args:
        log_ratio: [T] per token, log_probs - old_log_probs; its gradient is not used.
        delta: a response has drifted when its mean of old_log_probs - log_probs exceeds this.

    Source: DeepSeek-V3.2, arXiv:2512.02556, section 3.1, "off-policy sequence masking".
    """
    drift = segment_mean(-log_ratio.detach(), mask, segments, segment_sum)
    return (advantages < 0) & (drift > delta)
