"""Rows of a matrix gathered, and gathered sums of rows; both the same every time."""

# Triton's launches have no types.
# pyright: reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from slime.backends.megatron.layers.fused.norm import num_warps


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """[M, H] rows `index` [M] of x [N, H]."""
    x = x.contiguous()
    out = x.new_empty(len(index), x.shape[1])
    if len(index):
        block = triton.next_power_of_2(x.shape[1])
        _gather[(len(index),)](x, index, out, x.shape[1], block, num_warps=num_warps(block))
    return out


def sum_rows(x: Tensor, index: Tensor) -> Tensor:
    """[T, H]: for each row of `index` [T, K] the sum of those rows of x [N, H], in fp32, in order.

    -1 in `index` stands for no row.
    """
    x = x.contiguous()
    out = x.new_empty(len(index), x.shape[1])
    if len(index):
        block = triton.next_power_of_2(x.shape[1])
        _gather_sum[(len(index),)](
            x, index, out, index.shape[1], x.shape[1], block, num_warps=num_warps(block)
        )
    return out


@triton.jit
def _gather(x, index, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    source = tl.load(index + row).to(tl.int64) * SIZE
    tl.store(out + row * SIZE + columns, tl.load(x + source + columns, mask=mask), mask=mask)


@triton.jit
def _gather_sum(x, index, out, COUNT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.static_range(COUNT):
        source = tl.load(index + row * COUNT + number).to(tl.int64)
        is_there = mask & (source >= 0)
        total += tl.load(x + source * SIZE + columns, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + columns, total.to(out.dtype.element_ty), mask=mask)
