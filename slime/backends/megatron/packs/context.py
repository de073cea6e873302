"""Context parallelism: which tokens of a pack a rank holds, and the keys of all the others.

Every sequence is cut into 2 x cp equal chunks; rank r holds chunks r and 2 cp - 1 - r, so that all
ranks have the same work under a causal mask (zigzag). Keys and values are gathered from all ranks,
and each chunk attends to the prefix of its sequence in one variable-length call.

Source: the zigzag order is that of Megatron-Core's and ring attention's load balancing; gathering
keys instead of passing them round is Llama 3's way (arXiv:2407.21783, section 3.3.2).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ContextPlan:
    """Attention of one rank's tokens [T] to the keys of all, [cp x T] in the order of the ranks.

    A "span" is one chunk of this rank with the prefix it attends to; K keys stand in all spans
    together, those of a sequence's first chunks twice.

    Attributes:
        group: the ranks that share each sequence.
        gather: [K] int64, row among all ranks' keys of each span's keys.
        uses: ([cp x T], [cp x T]) int64: where in the spans each of those rows is used, by a first
            and by a second chunk; K = nowhere.
        cu_queries, cu_keys: [spans + 1] int32 boundaries.
        lengths: (queries, keys) of each span.
        cu_sequences: [sequences + 1] int32 boundaries of the whole sequences, over all ranks.
        longest_sequence: tokens of the longest of them.
    """

    group: dist.ProcessGroup
    gather: Tensor
    uses: tuple[Tensor, Tensor]
    cu_queries: Tensor
    cu_keys: Tensor
    lengths: tuple[tuple[int, int], ...]
    cu_sequences: Tensor
    longest_sequence: int

    @property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a span."""
        return max(q for q, _ in self.lengths), max(k for _, k in self.lengths)

    def gather_keys(self, local: Tensor) -> Tensor:
        """[K, ...] keys of all spans from this rank's [T, ...]; differentiable, collective."""
        return _GatherKeys.apply(local, self)  # pyright: ignore[reportReturnType]


def local_tokens(lengths: list[int], rank: int, size: int) -> Ints:
    """[T] positions in the whole stream of the tokens that `rank` holds, in its order.

    Args:
        lengths: of the sequences, multiples of 2 x size.
    """
    pieces: list[Ints] = []
    start = 0
    for length in lengths:
        chunk = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            pieces.append(np.arange(chunk) + start + number * chunk)
        start += length
    return np.concatenate(pieces)


def context_plan(lengths: list[int], group: dist.ProcessGroup, device: torch.device) -> ContextPlan:
    """The plan of this rank for a stream of sequences of these lengths, multiples of 2 x cp."""
    rank, size = group.rank(), group.size()
    num_local = sum(lengths) // size
    gather: list[Ints] = []
    first, second = (np.full(num_local * size, -1, dtype=np.int64) for _ in range(2))
    spans: list[tuple[int, int]] = []
    start = num_keys = 0
    for length in lengths:
        chunk = length // (2 * size)
        rows = [_gathered_rows(i, chunk, start, num_local, size) for i in range(2 * size)]
        for number, use in ((rank, first), (2 * size - 1 - rank, second)):
            keys = np.concatenate(rows[: number + 1])
            use[keys] = np.arange(num_keys, num_keys + len(keys))
            gather.append(keys)
            spans.append((chunk, len(keys)))
            num_keys += len(keys)
        start += length // size
    for use in (first, second):
        use[use < 0] = num_keys

    def on_device(values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(device)

    boundaries = np.concatenate([[[0, 0]], np.cumsum(spans, axis=0)]).astype(np.int32)
    return ContextPlan(
        group=group,
        gather=on_device(np.concatenate(gather)),
        uses=(on_device(first), on_device(second)),
        cu_queries=on_device(np.ascontiguousarray(boundaries[:, 0])),
        cu_keys=on_device(np.ascontiguousarray(boundaries[:, 1])),
        lengths=tuple(spans),
        cu_sequences=on_device(np.cumsum([0, *lengths]).astype(np.int32)),
        longest_sequence=max(lengths),
    )


def _gathered_rows(number: int, chunk: int, start: int, num_local: int, size: int) -> Ints:
    """Rows, among all ranks' tokens, of one chunk of the sequence that begins at local `start`."""
    is_first = number < size
    owner = number if is_first else 2 * size - 1 - number
    return np.arange(chunk) + owner * num_local + start + (0 if is_first else chunk)


class _GatherKeys(torch.autograd.Function):
    """All-gather and reorder; backward adds up what first and second chunks say, then reduces.

    The sum of two gathers is the same every time, which a scatter-add on CUDA is not.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, plan: ContextPlan) -> Tensor:
        ctx.plan = plan
        whole = local.new_empty(plan.group.size() * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(whole, local.contiguous(), group=plan.group)
        return whole.index_select(0, plan.gather)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        plan: ContextPlan = ctx.plan
        padded = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])
        first, second = (padded.index_select(0, use) for use in plan.uses)
        whole = first.add_(second)
        local = whole.new_empty(whole.shape[0] // plan.group.size(), *whole.shape[1:])
        dist.reduce_scatter_tensor(local, whole, group=plan.group)
        return local, None


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group's ranks, each of which adds its own loss of it; differentiable.

    The gradient of each rank's part is the sum of what all ranks' losses say about the total.
    """
    return _SumOverRanks.apply(tensor, group)  # pyright: ignore[reportReturnType]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
