"""Checksum of a tensor's bytes, the same on every device: what a weight sync compares."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from slime.engines.strips import strips_of

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
    return start_strip_checksums(strips_of(tensors))


def start_strip_checksums(strips: Sequence[Tensor]) -> "Sums":
    """As `start_checksums`, of each row of some [n, num_bytes] uint8, whose rows have no gaps inside."""
    if not strips:
        return Sums(None)
    if _has_kernel(strips):
        from slime.engines.checksum_triton import sums

        return Sums(sums(strips))
    return Sums(torch.cat([sums_of(strip) for strip in strips]))


def _has_kernel(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.is_cuda for tensor in tensors)


class Sums:
    """Checksums that may be being computed.

    Args:
        values: [number of tensors] int64.
    """

    def __init__(self, values: Tensor | None) -> None:
        self._values = values

    def numbers(self) -> list[int]:
        """Them, waiting for the device."""
        return [] if self._values is None else self._values.cpu().numpy().tolist()


def sums_of(strip: Tensor) -> Tensor:
    """[n] int64 on the strip's device; sums and products wrap around, which is modulo 2^64.

    Args:
        strip: [n, num_bytes] uint8.
    """
    at_once = _rows_at_once(strip.device) * ROW * LANE_BYTES // max(1, strip.shape[1])
    pieces: Sequence[Tensor] = torch.split(strip, max(1, at_once))
    return torch.cat([_sums_of_few(piece) for piece in pieces])


def _sums_of_few(strip: Tensor) -> Tensor:
    """`sums_of` a strip whose rows, widened to 64 bits, fit into memory together, or which has one."""
    device, num_bytes = strip.device, strip.shape[1]
    num_lanes = num_bytes // LANE_BYTES
    num_rows = num_lanes // ROW
    words = strip[:, : num_lanes * LANE_BYTES]
    if words.storage_offset() % LANE_BYTES or words.stride(0) % LANE_BYTES:
        words = words.clone(memory_format=torch.contiguous_format)
    lanes = words.view(torch.int32) if num_lanes else words.to(torch.int32)
    total = _tails(lanes[:, num_rows * ROW :], strip[:, num_lanes * LANE_BYTES :], num_rows)
    total = total + _signed(num_bytes * LENGTH)
    rows_at_once = _rows_at_once(device)
    for start in range(0, num_rows, rows_at_once):
        stop = min(start + rows_at_once, num_rows)
        rows = lanes[:, start * ROW : stop * ROW].reshape(len(strip), -1, ROW).to(torch.int64)
        sums = (rows * columns(device)).sum(2)
        total = total + (sums * row_multipliers(start, stop, device)).sum(1)
    return total


def _rows_at_once(device: torch.device) -> int:
    return _ROWS_AT_ONCE_CPU if device.type == "cpu" else _ROWS_AT_ONCE


def _tails(lanes: Tensor, rest: Tensor, row: int) -> Tensor:
    """[n] of the last, incomplete row of each: its lanes, then up to 3 bytes as one more lane."""
    total = (lanes.to(torch.int64) * columns(lanes.device)[: lanes.shape[1]]).sum(1)
    if rest.shape[1]:
        places = torch.tensor([1, 1 << 8, 1 << 16][: rest.shape[1]], device=rest.device)
        # An odd constant no other position uses.
        total = total + (rest.to(torch.int64) * places).sum(1) * _signed(0xD6E8FEB86659FD93)
    return total * _row_multiplier(row)


def _signed(number: int) -> int:
    """`number` modulo 2^64, as int64 holds it."""
    return ((number + (1 << 63)) & _MASK) - (1 << 63)


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
