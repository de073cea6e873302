"""One chunk of log-probs on CUDA: logits are read once forward and once backward.

The same as `forward_chunk` and `backward_chunk` in log_probs.py, from logits that are not scaled
yet. Any number of rows and columns, without being compiled again.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false
# Triton's kernels have no types: their arguments are pointers and numbers of the compiler's own.

from typing import cast

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from slime.training.log_probs import ChunkLayout

_FORWARD_BLOCK = 2048
_BACKWARD_BLOCK = 2048


def forward_chunk(
    x: Tensor, targets: Tensor, layout: ChunkLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of one chunk, [n] each: log-probs, largest scaled logit, log of the sum beside it, entropy.

    Args:
        x: [n, columns] fp32 logits, contiguous; not yet divided by the temperature.
        targets: [n].
    """
    column, is_here = layout.local(targets)
    sums = x.new_empty(4, x.shape[0])
    if x.shape[0]:
        _row_sums[(x.shape[0],)](
            x, torch.where(is_here, column, -1), sums, x.shape[0], x.shape[1],
            1.0 / layout.temperature, _FORWARD_BLOCK, num_warps=8,
        )  # fmt: skip
    top, (target, total, weighted) = sums[0], sums[1:].unbind(0)
    if layout.group is not None:
        own = top
        top = layout.reduce(own.clone(), dist.ReduceOp.MAX)
        # A rank that holds nothing but padding has -inf and nothing to add.
        shift = torch.where(own.isinf(), 0.0, own - top)
        weighted = shift.exp() * (weighted + shift * total)
        total = shift.exp() * total
        target = torch.where(is_here, target - top, 0.0)
        target, total, weighted = layout.reduce(torch.stack([target, total, weighted])).unbind(0)
    else:
        target = target - top
    log_norm = total.log()
    entropy = log_norm - weighted / total if layout.needs_entropy else None
    return target - log_norm, top, log_norm, entropy


def backward_chunk(
    x: Tensor,
    targets: Tensor,
    layout: ChunkLayout,
    statistics: tuple[Tensor, Tensor],
    grad_log_probs: Tensor | None,
    entropy_terms: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """[n, columns] of `dtype`: the gradient with respect to logits that are not scaled.

    Args:
        x: [n, columns] fp32 logits again.
        statistics: [n] each, largest scaled logit and log of the sum.
        entropy_terms: [n] each, gradient of the entropy and the entropy.
    """
    column, is_here = layout.local(targets)
    grad = torch.empty(x.shape, dtype=dtype, device=x.device)
    top, log_norm = statistics
    grad_entropy, entropy = entropy_terms or (None, None)
    # That of a plain sum is one number with stride 0.
    grad_log_probs, grad_entropy = (
        None if slope is None else slope.contiguous() for slope in (grad_log_probs, grad_entropy)
    )
    grid = (x.shape[0], triton.cdiv(x.shape[1], _BACKWARD_BLOCK))
    if x.shape[0] and x.shape[1]:
        _gradient[grid](
            x, torch.where(is_here, column, -1), top, log_norm, grad_log_probs, grad_entropy,
            entropy, grad, x.shape[1], 1.0 / layout.temperature, _BACKWARD_BLOCK,
            HAS_LOG_PROBS=grad_log_probs is not None, HAS_ENTROPY=entropy_terms is not None,
            num_warps=8,
        )  # fmt: skip
    return cast(Tensor, grad)


@triton.jit
def _row_sums(x, target, sums, num_rows, num_columns, inverse_temperature, BLOCK: tl.constexpr):
    """Of each row: largest logit, the target's, sum of exp(x - top), sum of exp(x - top)(x - top)."""
    row = tl.program_id(0).to(tl.int64)
    x += row * num_columns
    lane = tl.arange(0, BLOCK)
    # Each lane keeps its own maximum and sums; they meet at the end.
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lane
        value = tl.load(x + columns, mask=columns < num_columns, other=float("-inf"))
        value *= inverse_temperature
        higher = tl.maximum(top, value)
        # -inf less -inf: a lane that has seen nothing yet.
        step = tl.where(top == float("-inf"), 0.0, top - higher)
        rise = tl.where(value == float("-inf"), 0.0, value - higher)
        part = tl.where(value == float("-inf"), 0.0, tl.exp(rise))
        shrink = tl.exp(step)
        weighted = shrink * (weighted + step * total) + part * rise
        total = shrink * total + part
        top = higher
    highest = tl.max(top, 0)
    step = tl.where(top == float("-inf"), 0.0, top - highest)
    shrink = tl.exp(step)
    tl.store(sums + row, highest)
    tl.store(sums + 2 * num_rows + row, tl.sum(shrink * total, 0))
    tl.store(sums + 3 * num_rows + row, tl.sum(shrink * (weighted + step * total), 0))
    at = tl.load(target + row)
    value = tl.load(x + at, mask=at >= 0, other=0.0) * inverse_temperature
    tl.store(sums + num_rows + row, value)


@triton.jit
def _gradient(
    x, target, top, log_norm, grad_log_probs, grad_entropy, entropy, grad, num_columns,
    inverse_temperature, BLOCK: tl.constexpr, HAS_LOG_PROBS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    value = tl.load(x + row * num_columns + columns, mask=mask, other=float("-inf"))
    log_p = (value * inverse_temperature - tl.load(top + row)) - tl.load(log_norm + row)
    p = tl.exp(log_p)
    result = tl.zeros([BLOCK], tl.float32)
    if HAS_LOG_PROBS:
        slope = tl.load(grad_log_probs + row)
        result = tl.where(columns == tl.load(target + row), slope, 0.0) - slope * p
    if HAS_ENTROPY:
        # A column at -inf has weight 0; 0 x -inf would be NaN.
        spread = tl.where(p > 0.0, p * (log_p + tl.load(entropy + row)), 0.0)
        result -= tl.load(grad_entropy + row) * spread
    result *= inverse_temperature
    tl.store(grad + row * num_columns + columns, result.to(grad.dtype.element_ty), mask=mask)
