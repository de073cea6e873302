"""What a bucket holds, and where in it: the same for every sync, so that it is told once."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Self

import torch
from torch import Tensor

# Each tensor begins where one of any dtype may.
_ALIGNMENT = 256


@dataclass(frozen=True)
class Layout:
    """The tensors of a bucket, one after the other."""

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, names: tuple[str, ...], tensors: Sequence[Tensor]) -> Self:
        """Of tensors by name."""
        return cls(names, tuple([t.dtype for t in tensors]), tuple([t.shape for t in tensors]))

    @classmethod
    def read(cls, text: str | bytes) -> Self:
        """Of `text`."""
        names, dtypes, shapes = json.loads(text)
        kinds = tuple(getattr(torch, name) for name in dtypes)
        return cls(tuple(names), kinds, tuple(map(tuple, shapes)))

    def text(self) -> str:
        """By which another process knows it."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        return json.dumps([self.names, dtypes, self.shapes])

    @cached_property
    def num_bytes(self) -> int:
        """Of the whole bucket."""
        return sum(map(_padded, self._sizes))

    @cached_property
    def _sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [
            math.prod(shape) * dtype.itemsize
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    @cached_property
    def _alike(self) -> list[int]:
        """How many tensors of one size follow each other, each time."""
        return [len(list(same)) for _, same in groupby(self._sizes)]

    def strips(self, flat: Tensor, counts: Sequence[int] | None = None) -> list[Tensor]:
        """[n, size] uint8 views of a bucket, [num_bytes] uint8, a row for each of n tensors of one size.

        Args:
            counts: how many tensors each of them shall have; as many as possible by default.
        """
        strips: list[Tensor] = []
        first = start = 0
        for count in self._alike if counts is None else counts:
            size = self._sizes[first]
            end = start + count * _padded(size)
            strips.append(
                flat[start:end].view(count, -1)[:, :size] if size else flat.new_empty(count, 0)
            )
            first, start = first + count, end
        return strips

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """Views of a bucket, [num_bytes] uint8, as the tensors they are."""
        rows = [row for strip in self.strips(flat) for row in strip.unbind()]
        return [
            row.view(dtype).view(shape)
            for row, dtype, shape in zip(rows, self.dtypes, self.shapes, strict=True)
        ]


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
