"""A whole Megatron tensor cut over the ranks of a tensor-parallel group, and joined again.

Tables are read without torch, which takes seconds to import: it is imported with the first tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from slime.errors import ShapeMismatch

if TYPE_CHECKING:
    from torch import Tensor

# replicated: each rank holds all of it. column: cut along the output, dim 0. row: along the input,
# dim 1. gate_up: dim 0 holds two matrices; a rank has its part of the first, then of the second.
Sharding = Literal["replicated", "column", "row", "gate_up"]

_CUT_DIM: dict[Sharding, int] = {"column": 0, "row": 1, "gate_up": 0}


def shard(whole: Tensor, sharding: Sharding, rank: int, size: int) -> Tensor:
    """The part of `whole` that `rank` of `size` holds; a view of it where one exists.

    Raises:
        ShapeMismatch: the cut dimension does not divide evenly.
    """
    if sharding == "replicated" or size == 1:
        return whole
    dim = _CUT_DIM[sharding]
    pieces = 2 * size if sharding == "gate_up" else size
    if whole.shape[dim] % pieces:
        raise ShapeMismatch(
            f"dimension {dim} of {list(whole.shape)} does not divide into {pieces} equal parts for "
            f"{size} tensor-parallel ranks; choose another --tensor-model-parallel-size, or, for "
            "experts, another --expert-tensor-parallel-size."
        )
    if sharding == "gate_up":
        gate, up = whole.chunk(2)
        return joined([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return whole.chunk(size, dim)[rank]


def unshard(parts: Sequence[Tensor], sharding: Sharding, *, stack: bool = False) -> Tensor:
    """The whole tensor from the parts of all ranks, in rank order; the inverse of `shard`.

    Args:
        stack: the parts are those of many tensors each, [n, ...].
    """
    if sharding == "replicated" or len(parts) == 1:
        return parts[0]
    dim = _CUT_DIM[sharding] + stack
    if sharding == "gate_up":
        halves = [part.chunk(2, dim) for part in parts]
        return joined([gate for gate, _ in halves] + [up for _, up in halves], dim)
    return joined(parts, dim)


def joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One after the other along `dim`."""
    import torch

    return torch.cat(list(tensors), dim)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One above the other along a new first dimension."""
    import torch

    return torch.stack(list(tensors))
