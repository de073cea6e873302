"""SwiGLU, and SwiGLU of experts with each row's probability."""

# Triton's launches have no types.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def swiglu(x: Tensor, probs: Tensor | None = None) -> Tensor:
    """silu(gate) x up [x probs], for x = [gate, up] along the last dimension.

    Args:
        x: [..., 2 F]; copied unless contiguous.
        probs: [rows] fp32 or None; carries a gradient too.
    """
    return _SwiGLU.apply(x, probs)  # pyright: ignore[reportReturnType]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probs: Tensor | None) -> Tensor:
        size = x.shape[-1] // 2
        rows = x.reshape(-1, 2 * size).contiguous()
        out = torch.empty(len(rows), size, dtype=x.dtype, device=x.device)
        grid = (len(rows), triton.cdiv(size, _BLOCK))
        if len(rows):
            _forward[grid](rows, probs, out, size, _BLOCK, probs is not None)
        ctx.save_for_backward(rows, probs)
        return out.view(*x.shape[:-1], size)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, probs = ctx.saved_tensors
        size = rows.shape[-1] // 2
        grad = grad_outputs[0].reshape(-1, size).contiguous()
        grad_x = torch.empty_like(rows)
        grad_probs = None if probs is None else torch.empty_like(probs)
        if len(rows):
            _backward[(len(rows),)](
                grad, rows, probs, grad_x, grad_probs, size, _BLOCK, probs is not None
            )
        return grad_x.view(*grad_outputs[0].shape[:-1], 2 * size), grad_probs


@triton.jit
def _forward(x, probs, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_PROBS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate = tl.load(x + row * 2 * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * SIZE + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    if HAS_PROBS:
        result *= tl.load(probs + row).to(tl.float32)
    tl.store(out + row * SIZE + columns, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad, x, probs, grad_x, grad_probs, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    HAS_PROBS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * 2 * SIZE
    grad_x += row * 2 * SIZE
    factor = 1.0
    if HAS_PROBS:
        factor = tl.load(probs + row).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < SIZE
        gate = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(x + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
        slope = tl.load(grad + row * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if HAS_PROBS:
            total += slope * silu * up
            slope *= factor
        # d silu / d gate = sigmoid + silu x (1 - sigmoid)
        grad_gate = slope * up * (sigmoid + silu * (1.0 - sigmoid))
        dtype = grad_x.dtype.element_ty
        tl.store(grad_x + columns, grad_gate.to(dtype), mask=mask)
        tl.store(grad_x + SIZE + columns, (slope * silu).to(dtype), mask=mask)
    if HAS_PROBS:
        tl.store(grad_probs + row, tl.sum(total, 0).to(grad_probs.dtype.element_ty))
