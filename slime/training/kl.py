"""Estimators of the KL divergence between the policy and the reference, one value per token."""

from typing import Literal

import torch
from torch import Tensor

KlKind = Literal["k1", "k2", "k3", "low_var_kl"]

_LOW_VAR_BOUND = 10.0


def kl_estimate(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    kind: KlKind,
    *,
    importance_ratio: Tensor | None = None,
) -> Tensor:
    """KL(policy || reference) at each token, estimated from one sampled token.

    With x = log_probs - ref_log_probs: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x; low_var_kl is k3
    held in [-10, 10], so that one token the policy has given up cannot own the step.

    Args:
        log_probs, ref_log_probs: [T]; the gradient flows to whatever carries it.
        kind: the estimator.
        importance_ratio: [T] exp(log_probs - old_log_probs) *with* its gradient: makes value and
            gradient unbiased when the tokens were sampled by an older policy. Applied before the
            bound.

    Returns:
        [T], fp32 for fp32 inputs.

    Raises:
        ValueError: `kind` is unknown.

    Source: J. Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html); the
    ratio as in DeepSeek-V3.2, arXiv:2512.02556, section 3.1.
    """
    x = log_probs - ref_log_probs
    if kind == "k1":
        kl = x
    elif kind == "k2":
        kl = x.square() / 2
    elif kind in ("k3", "low_var_kl"):
        # expm1 keeps the tiny values of an almost unchanged policy, which exp(-x) - 1 rounds off.
        kl = torch.expm1(-x) + x
    else:
        raise ValueError(f"kl kind {kind!r}: expected k1, k2, k3 or low_var_kl")
    if importance_ratio is not None:
        kl = importance_ratio * kl
    if kind == "low_var_kl":
        kl = kl.clamp(-_LOW_VAR_BOUND, _LOW_VAR_BOUND)
    return kl
