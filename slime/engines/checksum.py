"""Checksum of a tensor's bytes, the same on every device: what a weight sync compares."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Lanes are 32-bit words widened to 64 bits. With 64-bit lanes a swap of two top bits would cancel,
# because the difference of two odd multipliers is even.
LANE_BYTES = 4
ROW = 1 << 16
# Rows per pass. On a GPU many, 32 MiB widened; on a CPU what stays in its cache, 1 MiB.
_ROWS_AT_ONCE = 64
_ROWS_AT_ONCE_CPU = 2
_MASK = (1 << 64) - 1
# Of the number of bytes.
LENGTH = 0x9E3779B97F4A7C15


def checksum(tensor: Tensor) -> int:
    """Sum over 32-bit words of word x multiplier of its position, modulo 2^64, as a signed integer.

    Every multiplier is odd, so a change of one word always shows; multipliers are pseudo-random, so
    exchanged words, transposed matrices and shifted rows show too. Shape and dtype do not enter,
    only bytes and their number.

    Args:
        tensor: any dtype, device and strides.
    """
    return checksums([tensor])[0]


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """`checksum` of each; a GPU is waited for once and not for each tensor."""
    return start_checksums(tensors).numbers()


def start_checksums(tensors: Sequence[Tensor]) -> "Sums":
    """`checksum` of each, once they are asked for; a GPU computes meanwhile.

    The tensors must not change before, but on its own stream.
    """
    if tensors and all(tensor.is_cuda for tensor in tensors):
        from slime.engines.checksum_triton import sums

        return Sums(sums(tensors))
    return Sums(torch.stack([sum_of(tensor) for tensor in tensors]) if tensors else None)


class Sums:
    """Checksums that may be being computed.

    Args:
        values: [number of tensors] int64.
    """

    def __init__(self, values: Tensor | None) -> None:
        self._values = values

    def numbers(self) -> list[int]:
        """Them, waiting for the device."""
        return [] if self._values is None else [int(x) for x in self._values.cpu().numpy()]


def sum_of(tensor: Tensor) -> Tensor:
    """[] int64 on the tensor's device; sums and products wrap around, which is modulo 2^64."""
    data = _bytes(tensor)
    device = tensor.device
    num_lanes = data.numel() // LANE_BYTES
    num_rows = num_lanes // ROW
    lanes = data[: num_lanes * LANE_BYTES].view(torch.int32)
    rows_at_once = _ROWS_AT_ONCE_CPU if device.type == "cpu" else _ROWS_AT_ONCE
    total = _tail(lanes[num_rows * ROW :], data[num_lanes * LANE_BYTES :], num_rows)
    total = total + _signed(data.numel() * LENGTH)
    for start in range(0, num_rows, rows_at_once):
        stop = min(start + rows_at_once, num_rows)
        rows = lanes[start * ROW : stop * ROW].view(-1, ROW).to(torch.int64)
        sums = (rows * columns(device)).sum(1)
        total = total + (sums * row_multipliers(start, stop, device)).sum()
    return total


def _tail(lanes: Tensor, rest: Tensor, row: int) -> Tensor:
    """Of the last, incomplete row: its lanes, then up to 3 bytes as one more lane."""
    total = (lanes.to(torch.int64) * columns(lanes.device)[: lanes.numel()]).sum()
    if rest.numel():
        places = torch.tensor([1, 1 << 8, 1 << 16][: rest.numel()], device=rest.device)
        # An odd constant no other position uses.
        total = total + (rest.to(torch.int64) * places).sum() * _signed(0xD6E8FEB86659FD93)
    return total * _row_multiplier(row)


def _signed(number: int) -> int:
    """`number` modulo 2^64, as int64 holds it."""
    return ((number + (1 << 63)) & _MASK) - (1 << 63)


def _bytes(tensor: Tensor) -> Tensor:
    """[num_bytes] uint8; a view where alignment allows."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % LANE_BYTES:
        data = data.clone()
    return data


@lru_cache(maxsize=16)
def columns(device: torch.device) -> Tensor:
    """[ROW] int64 multipliers of the positions inside a row."""
    return _odd_numbers(1, ROW).to(device)


@lru_cache(maxsize=4096)
def row_multipliers(start: int, stop: int, device: torch.device) -> Tensor:
    """[stop - start] int64 multipliers of whole rows."""
    return _odd_numbers((1 << 32) + start, stop - start).to(device)


@lru_cache(maxsize=4096)
def _row_multiplier(row: int) -> int:
    """The multiplier of one row."""
    return int(_odd_numbers((1 << 32) + row, 1)[0].item())


def _odd_numbers(start: int, count: int) -> Tensor:
    """[count] odd int64 from splitmix64 of start, start + 1, ...

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators",
    doi:10.1145/2660193.2660195.
    """
    z = np.arange(start, start + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64))  # pyright: ignore[reportUnknownMemberType]
