"""Tokens to their experts and back: sent once to every rank that has one of them, sorted by expert.

Ranks that share the experts send each other tokens, not token-expert pairs: with 8 experts per token
on 4 ranks that is less than half, and each rank adds up its experts' outputs before it sends them
back. Every way of rows is a gather or a sum of gathered rows in a fixed order: nothing is
scattered, so the same input gives the same bits. The host waits for the device only where ranks
exchange tokens, whose numbers it has to know: one copy per layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.typed_torch import apply_module
from torch import Tensor

# Stands for a probability that underflowed: a chosen expert must not look like one that is not.
_TINY = 1e-30

Experts = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, None]]


class PackedMoE(MoELayer):
    """Megatron's layer of experts with our own way of the tokens."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Any = None
    ) -> tuple[Tensor, None]:
        """(output [T, 1, H], no bias) from hidden states [T, 1, H] of this rank's tokens."""
        if self.moe_layer_recompute and self.training:
            output = tensor_parallel.checkpoint(self._compute, False, hidden_states)
        else:
            output = self._compute(hidden_states)
        return cast(Tensor, output), None

    def _compute(self, hidden: Tensor) -> Tensor:
        shared = self.shared_experts_compute(hidden)
        probs, routing_map = self.route(hidden)
        probs = torch.where(routing_map, probs.clamp_min(_TINY), 0.0)
        output = self._routed(hidden.flatten(0, 1), probs).view_as(hidden)
        return output if shared is None else output + shared

    def _routed(self, x: Tensor, probs: Tensor) -> Tensor:
        """[T, H]: for each token the sum of its experts' outputs times their probabilities.

        Args:
            x: [T, H].
            probs: [T, E], more than 0 for the experts chosen.
        """
        experts: Any = apply_module(self.experts)
        count = self.config.moe_router_topk
        assert self.token_dispatcher is not None, "made by MoELayer"
        matrix_ranks = self.token_dispatcher.tp_group
        if matrix_ranks.size() > 1:  # each of them has a part of every expert and sees all tokens
            x, probs = (
                gather_from_sequence_parallel_region(y, group=matrix_ranks) for y in (x, probs)
            )
        if self.ep_group.size() > 1:
            output = _over_ranks(x, probs, count, experts, self.ep_group)
        else:
            output = _on_this_rank(x, probs, count, len(x) * count, experts)
        if matrix_ranks.size() > 1:
            output = reduce_scatter_to_sequence_parallel_region(output, group=matrix_ranks)
        return output


@dataclass(frozen=True)
class Places:
    """Where rows of a [N, H] matrix stand in a longer list of them, each at most K times.

    Attributes:
        rows: [M] int64, which row each place has.
        places: [N, K] int64, the places of each row; -1 = fewer than K.
    """

    rows: Tensor
    places: Tensor

    @classmethod
    def of_marks(cls, marks: Tensor, most: int, count: int) -> tuple["Places", Tensor]:
        """A place for every mark of [N, C], column by column; and [M] the column of each place.

        Args:
            most: marks in a row.
            count: marks in all, M.
        """
        found = torch.nonzero_static(marks.t(), size=count)
        columns, rows = found.unbind(1)
        slots = (marks.cumsum(1) - 1)[rows, columns]
        places = torch.full((len(marks), most), -1, dtype=torch.int64, device=marks.device)
        places[rows, slots] = torch.arange(count, device=marks.device)
        return cls(rows, places), columns

    def spread(self, x: Tensor) -> Tensor:
        """[M, H]: each row of x [N, H] at all its places."""
        return _Spread.apply(x, self.rows, self.places)  # pyright: ignore[reportReturnType]

    def collect(self, x: Tensor) -> Tensor:
        """[N, H]: for each row the sum of x [M, H] over its places."""
        return _Collect.apply(x, self.rows, self.places)  # pyright: ignore[reportReturnType]


def _on_this_rank(x: Tensor, probs: Tensor, most: int, count: int, experts: Experts) -> Tensor:
    """[N, H]: the sum of this rank's experts for each row.

    Args:
        x: [N, H].
        probs: [N, E of this rank], more than 0 for the experts chosen.
        most: experts chosen for a row, at most.
        count: of all rows together.
    """
    marks = probs > 0.0
    places, columns = Places.of_marks(marks, min(most, probs.shape[1]), count)
    at = places.rows * probs.shape[1] + columns
    outputs, _ = experts(places.spread(x), marks.sum(0), probs.flatten().index_select(0, at))
    return places.collect(outputs)


def _over_ranks(
    x: Tensor, probs: Tensor, most: int, experts: Experts, group: dist.ProcessGroup
) -> Tensor:
    """As `_on_this_rank`, for experts that the ranks of `group` share; collective."""
    size, rank = group.size(), group.rank()
    parts = probs.view(len(probs), size, -1)  # the experts of each rank
    marks = parts > 0.0
    is_sent = marks.any(2)
    own = torch.stack([is_sent.sum(0), marks.sum((0, 2))])
    everyone = own.new_empty(size * own.numel())
    dist.all_gather_into_tensor(everyone, own.flatten(), group=group)
    # [from rank, tokens or pairs, to rank]
    table = cast(list[list[list[int]]], everyone.view(size, 2, size).tolist())
    sent, received = table[rank][0], [numbers[0][rank] for numbers in table]
    num_pairs = sum(numbers[1][rank] for numbers in table)

    places, ranks = Places.of_marks(is_sent, min(most, size), sum(sent))
    at = places.rows * size + ranks
    sent_probs = parts.flatten(0, 1).index_select(0, at)
    there = exchange(places.spread(x), sent, received, group)
    probs_there = exchange(sent_probs, sent, received, group)
    outputs = _on_this_rank(there, probs_there, most, num_pairs, experts)
    return places.collect(exchange(outputs, received, sent, group))


def exchange(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """[sum of received, ...] rows from all ranks in order; differentiable, collective.

    Args:
        rows: [sum of sent, ...], those for each rank together, in order of the ranks.
    """
    return _Exchange.apply(rows, sent, received, group)  # pyright: ignore[reportReturnType]


def _exchange(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """What stays on this rank is copied; only the rest goes through the network's buffers."""
    rows = rows.contiguous()
    out = rows.new_empty(sum(received), *rows.shape[1:])
    to, by = rows.split(sent), out.split(received)
    own = group.rank()
    by[own].copy_(to[own])
    others = [peer for peer in range(group.size()) if peer != own]
    calls = [
        dist.P2POp(call, part, group=group, group_peer=peer)
        for peer in others
        for call, part in ((dist.isend, to[peer]), (dist.irecv, by[peer]))
        if len(part)
    ]
    for work in dist.batch_isend_irecv(calls) if calls else []:
        work.wait()
    return out


def _gather(x: Tensor, index: Tensor) -> Tensor:
    if x.is_cuda:
        from slime.backends.megatron.layers.fused.rows import gather_rows

        return gather_rows(x, index)
    return x.index_select(0, index)


def _sum(x: Tensor, index: Tensor) -> Tensor:
    if x.is_cuda:
        from slime.backends.megatron.layers.fused.rows import sum_rows

        return sum_rows(x, index)
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    at = torch.where(index < 0, len(x), index)
    return padded.index_select(0, at.flatten()).view(*index.shape, x.shape[1]).sum(1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return _gather(x, rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _sum(grad_outputs[0], places), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return _sum(x, places)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return _gather(grad_outputs[0], rows), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.arguments = (received, sent, group)
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad_outputs[0], *ctx.arguments), None, None, None
