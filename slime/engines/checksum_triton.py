"""`checksum` of many tensors on CUDA by one kernel, which reads every byte once."""

# pyright: basic, reportCallIssue=false, reportArgumentType=false
# Triton's kernels have no types: their arguments are pointers and numbers of the compiler's own.

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from slime.engines import checksum as plain

_BLOCK = 4096


def sums(strips: Sequence[Tensor]) -> Tensor:
    """[total rows] int64 on their device, not waited for: what `checksum` says of each row.

    Args:
        strips: [n, num_bytes] uint8 each, rows without gaps inside, all on the current CUDA device.
    """
    device = strips[0].device
    counts = np.array([strip.shape[0] for strip in strips], np.int64)
    firsts = counts.cumsum() - counts
    by_words = [_is_words(strip) for strip in strips]
    chosen = np.repeat(by_words, counts).nonzero()[0]
    places = np.arange(counts.sum()) - np.repeat(firsts, counts)
    starts = _repeated([strip.data_ptr() for strip in strips], counts)
    starts += places * _repeated([strip.stride(0) for strip in strips], counts)
    sizes = _repeated([strip.shape[1] for strip in strips], counts)
    totals = torch.zeros(len(sizes), dtype=torch.int64, device=device)
    if len(chosen):
        lanes = sizes[chosen] // plain.LANE_BYTES
        rows = -(-lanes // plain.ROW)
        owner = np.repeat(np.arange(len(chosen)), rows)
        row = np.arange(len(owner)) - np.repeat(rows.cumsum() - rows, rows)
        table = np.concatenate([starts[chosen][owner] + row * plain.ROW * plain.LANE_BYTES,
                                np.minimum(lanes[owner] - row * plain.ROW, plain.ROW),
                                row, chosen[owner]])  # fmt: skip
        blocks = _to(device, table).view(4, -1)
        parts = torch.empty(len(owner), dtype=torch.int64, device=device)
        _rows[(len(owner),)](
            blocks, blocks[1], blocks[2], plain.columns(device), _multipliers(int(rows.max()), device),
            parts, plain.ROW, _BLOCK, num_warps=8,
        )  # fmt: skip
        totals.index_add_(0, blocks[3], parts)
        lengths = (sizes.astype(np.uint64) * np.uint64(plain.LENGTH)).view(np.int64)
        lengths[~np.repeat(by_words, counts)] = 0
        totals += _to(device, lengths)
    for strip, first, is_words in zip(strips, firsts, by_words, strict=True):
        if not is_words:
            totals[first : first + strip.shape[0]] = plain.sums_of(strip)
    return totals


def _is_words(strip: Tensor) -> bool:
    """Whether its rows are whole words, where words may be."""
    count, size = strip.shape
    step = strip.stride(0) if count > 1 else 0
    return size > 0 and not (strip.data_ptr() | size | step) % plain.LANE_BYTES


def _repeated(numbers: Sequence[int], counts: np.ndarray) -> np.ndarray:
    return np.repeat(np.array(numbers, np.int64), counts)


def _to(device: torch.device, numbers: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(numbers)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _multipliers(rows: int, device: torch.device) -> Tensor:
    """At least [rows] int64."""
    return _rounded_multipliers(max(256, 1 << (rows - 1).bit_length()), device)


@lru_cache(maxsize=16)
def _rounded_multipliers(rows: int, device: torch.device) -> Tensor:
    return plain.row_multipliers(0, rows, device)


@triton.jit
def _rows(
    starts, counts, numbers, columns, multipliers, out, ROW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row of one tensor."""
    i = tl.program_id(0)
    words = tl.load(starts + i).to(tl.pointer_type(tl.int32))
    count = tl.load(counts + i)
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, ROW, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word = tl.load(words + at, mask=at < count, other=0).to(tl.int64)
        total += word * tl.load(columns + at)
    multiplier = tl.load(multipliers + tl.load(numbers + i))
    tl.store(out + i, tl.sum(total) * multiplier)
