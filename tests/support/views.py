"""Token views of random samples, for losses that need no model."""

from dataclasses import replace

import torch
from torch import Tensor

from slime.training.interface import TokenView


def random_view(
    lengths: tuple[int, ...] = (3, 1, 5), *, seed: int = 0, needs_entropy: bool = True
) -> TokenView:
    """fp64 view with every column; token 1 is masked; weights sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = torch.ones(count, dtype=torch.float64)
    mask[1:2] = 0.0
    columns = {
        "loss_mask": mask,
        "weight": mask / mask.sum(),
        "advantages": uniform(-1, 1),
        "old_log_probs": uniform(-2, -1),
        "ref_log_probs": uniform(-2, -1),
        "rollout_log_probs": uniform(-2, -1),
    }

    def segment_sum(values: Tensor) -> Tensor:
        return torch.zeros(len(lengths), dtype=values.dtype).index_add(0, segments, values)

    return TokenView(
        log_probs=uniform(-2, -1).requires_grad_(),
        entropy=uniform(0, 1).requires_grad_() if needs_entropy else None,
        columns=columns,
        segments=segments,
        num_segments=len(lengths),
        segment_sum=segment_sum,
    )


def without(view: TokenView, *names: str) -> TokenView:
    """The same view without some columns."""
    return replace(view, columns={n: c for n, c in view.columns.items() if n not in names})
