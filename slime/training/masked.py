"""Masked sums and means with a denominator the caller gives, and whitening over all ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SumOverDp = Callable[[Tensor], Tensor]


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask` is not 0, weighted by it; a scalar, gradient flows to `values`.

    A masked value may be inf or NaN: it is dropped before the product, because 0 x inf is NaN.
    """
    return (torch.where(mask != 0, values, 0.0) * mask).sum()


def masked_mean(values: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """`masked_sum` over `denominator`, which must cover the *whole* optimizer step to be exact."""
    return masked_sum(values, mask) / denominator


def segment_mean(
    values: Tensor, mask: Tensor, segments: Tensor, segment_sum: Callable[[Tensor], Tensor]
) -> Tensor:
    """Mean over the trainable tokens of each token's own response.

    Args:
        values, mask: [T].
        segments: [T] int64, the sample each token belongs to.
        segment_sum: [T] -> [num_segments], over whole responses (see `TokenView`).

    Returns:
        [T], the same number for all tokens of a sample; 0 for a sample without trainable tokens.
    """
    sums = segment_sum(torch.where(mask != 0, values, 0.0) * mask)
    counts = segment_sum(mask)
    return (sums / counts.clamp(min=1.0))[segments]


def whiten(
    rows: Sequence[Tensor], masks: Sequence[Tensor], sum_over_dp: SumOverDp, *, eps: float = 1e-8
) -> list[Tensor]:
    """Rows shifted and scaled to mean 0 and variance 1 over the trainable tokens of all ranks.

    Args:
        rows: of [R], one per sample of this data-parallel rank.
        masks: of [R], 1 = counts towards mean and variance. Masked tokens are transformed as well.
        sum_over_dp: sum over data-parallel ranks; called twice, also by a rank without samples.
        eps: added to the variance (unbiased).

    Returns:
        fp32 [R] rows. Two passes in fp64: E[x^2] - E[x]^2 would lose the small spread of large
        values.
    """
    values = torch.cat([*rows, torch.empty(0)]).double()
    mask = torch.cat([*masks, torch.empty(0)]).double()
    totals = sum_over_dp(torch.stack([mask.sum(), masked_sum(values, mask)]))
    count, total = float(totals[0]), float(totals[1])
    centered = values - total / max(count, 1.0)
    squares = float(sum_over_dp(masked_sum(centered.square(), mask)))
    variance = squares / max(count - 1.0, 1.0)
    white = (centered * (variance + eps) ** -0.5).float()
    return list(white.split([row.numel() for row in rows])) if rows else []
