"""RMSNorm in one pass forward and one backward."""

# Triton's launches have no types.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of the backward pass; each adds up the weight's gradient over its rows.
_PROGRAMS_PER_SM = 4


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) x weight over the last dimension, of the dtype of x.

    Args:
        x: [..., H]; copied unless contiguous.
        weight: [H].
    """
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


def num_programs(device: torch.device, rows: int) -> int:
    """Programs of a kernel that walks over rows; at least one."""
    if device.type != "cuda":  # Triton's interpreter
        return 2
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return max(min(_PROGRAMS_PER_SM * sms, rows), 1)


def num_warps(block: int) -> int:
    """Warps for a tile of so many elements: 8 to 32 elements per thread."""
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        rows = x.reshape(-1, size).contiguous()
        out = torch.empty_like(rows)
        scale = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(size)
        if len(rows):
            _forward[(len(rows),)](
                rows, weight, out, scale, eps, size, block, num_warps=num_warps(block)
            )
        ctx.save_for_backward(rows, weight, scale)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, scale = ctx.saved_tensors
        size = rows.shape[-1]
        grad = grad_outputs[0].reshape(-1, size).contiguous()
        grad_x = torch.empty_like(rows)
        programs = num_programs(rows.device, len(rows))
        sums = torch.empty(programs, size, dtype=torch.float32, device=rows.device)
        block = triton.next_power_of_2(size)
        _backward[(programs,)](
            grad, rows, weight, scale, grad_x, sums, len(rows), size, block,
            num_warps=num_warps(block),
        )  # fmt: skip
        return grad_x.view(grad_outputs[0].shape), sums.sum(0).to(weight.dtype), None


@triton.jit
def _forward(x, weight, out, scale, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    values = tl.load(x + row * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    result = values * inverse * factor
    tl.store(out + row * SIZE + columns, result.to(out.dtype.element_ty), mask=mask)
    tl.store(scale + row, inverse)


@triton.jit
def _backward(
    grad, x, weight, scale, grad_x, sums, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for number in range(program, num_rows, tl.num_programs(0)):
        row = number * SIZE
        inverse = tl.load(scale + number)
        normed = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32) * inverse
        slope = tl.load(grad + row + columns, mask=mask, other=0.0).to(tl.float32)
        total += slope * normed
        slope *= factor
        mean = tl.sum(slope * normed, 0) / SIZE
        result = (slope - normed * mean) * inverse
        tl.store(grad_x + row + columns, result.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(sums + program * SIZE + columns, total, mask=mask)
