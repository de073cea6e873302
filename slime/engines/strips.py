"""Tensors that follow each other in memory, taken as one: a copy or a checksum of all of them at once.

The experts of a layer are hundreds of tensors of a few stacks; whatever is done to each alone costs a host
more time than a card needs for the bytes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# From here on a copy of its own, as fast as memory is; what is smaller goes with others in one call.
_BIG_BYTES = 2**20


def strips_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """[n, num_bytes] uint8 for each n tensors that follow each other, in their order; views where they can be.

    Together the strips have a row for every tensor. Shapes and dtypes do not enter, only bytes.
    """
    strips: list[Tensor] = []
    first, count, size, following, end = torch.empty(0), 0, 0, -1, 0
    for tensor in tensors:
        # Neighbours may belong to two allocations, which no one view can cover.
        if (
            tensor.data_ptr() == following
            and tensor.nbytes == size
            and following + size <= end
            and tensor.is_contiguous()
        ):
            count, following = count + 1, following + size
            continue
        if count:
            strips.append(_strip(first, count, size))
        first, count, size = tensor.detach().contiguous(), 1, tensor.nbytes
        storage = first.untyped_storage()
        following, end = first.data_ptr() + size, storage.data_ptr() + storage.nbytes()
    if count:
        strips.append(_strip(first, count, size))
    return strips


def _strip(first: Tensor, count: int, size: int) -> Tensor:
    data = first.view(-1).view(torch.uint8)
    if count == 1:
        return data.view(1, size)
    return data.as_strided((count, size), (size, 1), data.storage_offset())


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Each of `sources` into the one of `targets`, of the same shape."""
    small = [i for i, source in enumerate(sources) if source.nbytes < _BIG_BYTES]
    if small:
        together: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        together([targets[i] for i in small], [sources[i] for i in small])
    for target, source in zip(targets, sources, strict=True):
        if source.nbytes >= _BIG_BYTES:
            target.copy_(source)
