"""Elementwise operations with hand-written gradients.

They pass over memory less often than autograd's chains do; on CUDA the Triton kernels of `fused`
stand for them. All are exact: no approximation, only another order of additions.
"""

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) x weight over the last dimension."""
    if x.is_cuda:
        from slime.backends.megatron.layers.fused import norm

        return norm.rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) x up, for x = [gate, up] along the last dimension."""
    if x.is_cuda:
        from slime.backends.megatron.layers.fused import swiglu as fused

        return fused.swiglu(x)
    return _SwiGLU.apply(x)  # pyright: ignore[reportReturnType]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> Tensor:
    """Rotary position embedding of the first dimensions of x.

    Args:
        x: [T, 1, heads, D].
        cos, sin: [T, 1, 1, D_rot / 2], one angle per pair; the last D - D_rot dimensions pass
            unchanged.
        is_interleaved: a pair is two neighbours (GLM), else dimensions i and i + D_rot / 2 (most
            models).
    """
    return _Rotate.apply(x, cos, sin, is_interleaved)  # pyright: ignore[reportReturnType]


def take(
    x: Tensor, index: Tensor, inverse: Tensor, copies: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """x[index] along dimension 0, where `inverse` finds every row of x once: x[index][inverse] = x.

    Rows of the result that neither `inverse` nor `copies` names are copies whose gradient must be 0
    or unwanted. The backward pass is then another gather instead of a slow scatter-add.

    Args:
        copies: ([C] rows of the result, [C] the rows of x they repeat) whose gradient counts too.
    """
    return _Take.apply(x, index, inverse, *(copies or (None, None)))  # pyright: ignore[reportReturnType]


def put_back(x: Tensor, inverse: Tensor) -> Tensor:
    """x[inverse] along dimension 0, the way back from `take`: rows not named get no gradient."""
    return _PutBack.apply(x, inverse)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = (wide * wide).sum(-1, keepdim=True).div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = wide * inverse
        ctx.save_for_backward(normed, weight, inverse)
        return (normed.to(x.dtype) if x.dtype != normed.dtype else normed) * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grad_outputs
        normed, weight, inverse = ctx.saved_tensors
        wide = grad.float()
        grad_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        scaled = wide * weight
        mean = (scaled * normed).sum(-1, keepdim=True).div_(normed.shape[-1])
        grad_x = scaled.addcmul_(normed, mean, value=-1.0).mul_(inverse)
        return grad_x.to(grad.dtype), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        ctx.save_for_backward(x, sigmoid)
        return (sigmoid * gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (grad,) = grad_outputs
        x, sigmoid = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, -1)
        silu = gate * sigmoid
        torch.mul(grad, silu, out=grad_up)
        # d silu / d gate = sigmoid + silu x (1 - sigmoid)
        slope = torch.addcmul(silu, silu, sigmoid, value=-1.0).add_(sigmoid)
        torch.mul(slope.mul_(up), grad, out=grad_gate)
        return grad_x


def _pairs(x: Tensor, size: int, is_interleaved: bool) -> tuple[Tensor, Tensor]:
    if is_interleaved:
        return x[..., 0 : 2 * size : 2], x[..., 1 : 2 * size : 2]
    return x[..., :size], x[..., size : 2 * size]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool, sign: float) -> Tensor:
    size = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = _pairs(x, size, is_interleaved)
    out_first, out_second = _pairs(out, size, is_interleaved)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    out[..., 2 * size :] = x[..., 2 * size :]
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.is_interleaved = is_interleaved
        return _turn(x, cos, sin, is_interleaved, 1.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grad_outputs
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, ctx.is_interleaved, -1.0), None, None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, rows: Tensor | None, of: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inverse, rows, of)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grad_outputs
        inverse, rows, of = ctx.saved_tensors
        grad_x = grad.index_select(0, inverse)
        if rows is not None:
            grad_x.index_add_(0, of, grad.index_select(0, rows))
        return grad_x, None, None, None, None


class _PutBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        (inverse,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.num_rows, *grad.shape[1:])
        return out.index_copy_(0, inverse, grad), None
