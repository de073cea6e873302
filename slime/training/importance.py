"""Weights against the mismatch between the engine's probabilities and the trainer's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slime.training.policy_loss import bounded_ratio


@dataclass(frozen=True)
class ImportanceWeights:
    """Per-token weights, no gradient.

    Attributes:
        ratio: [T] exp(old_log_probs - rollout_log_probs): trainer's over engine's probability.
        weights: [T] what the policy loss is multiplied by.
        is_clipped: [T] bool, where the two differ.
    """

    ratio: Tensor
    weights: Tensor
    is_clipped: Tensor


def truncated_importance_weights(
    old_log_probs: Tensor, rollout_log_probs: Tensor, *, low: float, high: float
) -> ImportanceWeights:
    """The ratio held in [low, high] (TIS).

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training".
    """
    ratio = bounded_ratio((old_log_probs - rollout_log_probs).detach())
    weights = ratio.clamp(low, high)
    return ImportanceWeights(ratio, weights, weights != ratio)


def masked_importance_weights(
    old_log_probs: Tensor, rollout_log_probs: Tensor, *, low: float, high: float
) -> ImportanceWeights:
    """The ratio inside [low, high], 0 outside: a token the two disagree on does not train (IcePop).

    Source: Ring-1T, arXiv:2510.18855, section on IcePop.
    """
    ratio = bounded_ratio((old_log_probs - rollout_log_probs).detach())
    outside = (ratio < low) | (ratio > high)
    return ImportanceWeights(ratio, torch.where(outside, 0.0, ratio), outside)
