"""Checks of the Triton kernels, which run on a CPU in Triton's interpreter.

Called as `python fused_checks.py FILE` with TRITON_INTERPRET=1, which has to be set before Triton
is imported; FILE gets {name of the check: "" or what failed}. Nothing here imports Triton before.
"""

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FP32 = torch.float32
BF16 = torch.bfloat16
# bf16 has 8 bits; what is compared was computed in fp32 on both sides and rounded at the end.
_TOLERANCE = {FP32: 5e-5, BF16: 2e-2}


def check_norm(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "plain") -> None:
    """RMS norm and its gradients against torch's."""
    from slime.backends.megatron.layers.fused.norm import rms_norm

    x, grad = _laid_out(shape, dtype, layout), _laid_out(shape, dtype, layout)
    weight = (1.0 + 0.3 * _randn(shape[-1:], dtype)).detach().requires_grad_()
    x.requires_grad_()
    _compare(
        partial(rms_norm, eps=1e-6),
        lambda a, w: F.rms_norm(a.float(), shape[-1:], w.float(), 1e-6).to(a.dtype),
        (x, weight),
        grad,
    )


def check_swiglu(
    rows: tuple[int, ...], size: int, dtype: torch.dtype, layout: str = "plain"
) -> None:
    """SwiGLU and its gradients against autograd's."""
    from slime.backends.megatron.layers.fused.swiglu import swiglu

    x = _laid_out((*rows, 2 * size), dtype, layout).requires_grad_()
    _compare(swiglu, _naive_swiglu, (x,), _laid_out((*rows, size), dtype, layout))


def check_swiglu_of_experts(rows: int, size: int, dtype: torch.dtype) -> None:
    """The same with a probability for each row, which has a gradient too."""
    from slime.backends.megatron.layers.fused.swiglu import swiglu

    x = _randn((rows, 2 * size), dtype).requires_grad_()
    probs = torch.rand(rows).requires_grad_()
    _compare(swiglu, _naive_swiglu, (x, probs), _randn((rows, size), dtype))


def _naive_swiglu(x: Tensor, probs: Tensor | None = None) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    factor = 1.0 if probs is None else probs[:, None]
    return (F.silu(gate) * up * factor).to(x.dtype)


def check_heads(
    count: int,
    groups: int,
    queries: int,
    size: int,
    rotary: int,
    *,
    interleaved: bool = False,
    norm: bool = True,
    dtype: torch.dtype = FP32,
) -> None:
    """Cutting, norm and rotation of heads, with gradients, against the parts one by one."""
    from slime.backends.megatron.layers.fused.heads import HeadLayout, split_heads

    layout = HeadLayout(groups, queries, size, 1e-6, interleaved)
    mixed = _randn((count, layout.stride), dtype).requires_grad_()
    norms = [(1.0 + 0.3 * _randn((size,), dtype)).detach().requires_grad_() for _ in range(2)]
    angles = torch.rand(count, rotary // 2) * 6
    cos, sin = angles.cos(), angles.sin()

    def fused(mixed: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return split_heads(mixed, cos, sin, (weights[0], weights[1]) if norm else None, layout)

    def naive(mixed: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        heads = mixed.float().view(count, groups, queries + 2, size)
        query = heads[:, :, :queries].reshape(count, groups * queries, size)
        key, value = heads[:, :, queries], heads[:, :, queries + 1]
        if norm:
            query, key = (
                F.rms_norm(head, (size,), weight.float(), 1e-6)
                for head, weight in zip((query, key), weights, strict=True)
            )
        turned = (_naive_rotation(head, cos, sin, interleaved) for head in (query, key))
        return tuple(head.to(mixed.dtype) for head in (*turned, value))

    inputs = (mixed, *norms) if norm else (mixed,)
    # Heads' gradients often come as views of other layouts.
    grads = [
        _randn((count, size, number), dtype).transpose(1, 2)
        for number in (groups * queries, groups, groups)
    ]
    _compare(fused, naive, inputs, *grads)


def _naive_rotation(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of the first dimensions of each head [T, heads, D]."""
    width = 2 * cos.shape[1]
    part, rest = x[..., :width], x[..., width:]
    c, s = cos[:, None], sin[:, None]
    one, two = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    pair = (one * c - two * s, two * c + one * s)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, rest], -1)


def check_gathered_rows(rows: int, taken: int, size: int, dtype: torch.dtype) -> None:
    """Rows gathered, and sums of gathered rows, -1 standing for none."""
    from slime.backends.megatron.layers.fused.rows import gather_rows, sum_rows

    x = _randn((size, rows), dtype).t()  # of another layout in memory
    index = torch.randint(0, rows, (taken,))
    assert torch.equal(gather_rows(x, index), x[index])
    table = torch.randint(-1, rows, (taken, 3))
    padded = torch.cat([x, x.new_zeros(1, size)]).float()
    torch.testing.assert_close(
        sum_rows(x, table).float(),
        padded[table].sum(1).to(dtype).float(),
        atol=_TOLERANCE[dtype],
        rtol=_TOLERANCE[dtype],
    )


def check_log_probs(
    rows: int,
    columns: int,
    *,
    temperature: float = 1.0,
    offset: float = 0.0,
    start: int = 0,
    plain_sum: bool = False,
) -> None:
    """A chunk of log-probs and entropy, with gradients, against the one written in torch.

    Args:
        offset: added to all logits; the sums must not lose digits.
        start: first token of this rank's part; some targets are then elsewhere.
        plain_sum: gradients with stride 0, as those of a sum are.
    """
    from slime.training import log_probs_triton as fused
    from slime.training.log_probs import ChunkLayout, backward_chunk, forward_chunk

    x = 3 * torch.randn(rows, columns) + offset
    if rows and columns:
        x[0, columns // 2] = -torch.inf
    targets = torch.randint(0, start + columns, (rows,))
    layout = ChunkLayout(
        temperature=temperature,
        needs_entropy=True,
        rows=max(rows, 1),
        num_columns=columns,
        start=start,
        group=None,
    )
    found = fused.forward_chunk(x.clone(), targets, layout)
    expected = forward_chunk(x / temperature, targets, layout)
    here = (targets >= start) & torch.isfinite(expected[0])
    # Without a group the part of a target elsewhere means nothing.
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0][here], expected[0][here], atol=2e-5, rtol=1e-5)
    slopes = [torch.ones(1).expand(rows) if plain_sum else torch.randn(rows) for _ in range(2)]
    top, log_norm, entropy = expected[1:]
    assert entropy is not None
    log_p = x / temperature - top[:, None] - log_norm[:, None]
    wanted = backward_chunk(log_p, layout.local(targets), slopes[0], (slopes[1], entropy))
    ours = fused.backward_chunk(
        x, targets, layout, (top, log_norm), slopes[0], (slopes[1], entropy), FP32
    )
    torch.testing.assert_close(ours, wanted / temperature, atol=1e-5, rtol=1e-4)
    alone = fused.backward_chunk(x, targets, layout, (top, log_norm), slopes[0], None, BF16)
    log_p = x / temperature - top[:, None] - log_norm[:, None]
    wanted = backward_chunk(log_p, layout.local(targets), slopes[0], None) / temperature
    torch.testing.assert_close(alone.float(), wanted.to(BF16).float(), atol=1e-5, rtol=1e-2)


def _randn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def _laid_out(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Random numbers: "plain", "sliced" out of wider rows, or "transposed" in memory."""
    if layout == "sliced":
        return _randn((*shape[:-1], shape[-1] + 13), dtype)[..., : shape[-1]]
    if layout == "transposed":
        return _randn(shape[::-1], dtype).permute(*range(len(shape) - 1, -1, -1))
    return _randn(shape, dtype)


def _compare(
    fused: Callable[..., Any],
    naive: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    *grads: Tensor,
) -> None:
    """Outputs and gradients of both; bf16 may differ by a rounding."""
    found, expected = fused(*inputs), naive(*inputs)
    found, expected = (y if isinstance(y, tuple) else (y,) for y in (found, expected))
    tolerance = _TOLERANCE[inputs[0].dtype]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    ours = torch.autograd.grad(found, inputs, grads)
    theirs = torch.autograd.grad(expected, inputs, grads)
    for one, two in zip(ours, theirs, strict=True):
        assert one.shape == two.shape
        # A weight's gradient is a sum over rows, as large as they are many.
        torch.testing.assert_close(one, two, atol=2 * tolerance, rtol=2 * tolerance)


CHECKS: dict[str, Callable[[], None]] = {
    "norm": partial(check_norm, (5, 1, 96), FP32),
    "norm of a power of two": partial(check_norm, (3, 64), FP32),
    "norm in bf16": partial(check_norm, (6, 100), BF16),
    "norm of no rows": partial(check_norm, (0, 1, 96), FP32),
    "norm of a slice": partial(check_norm, (4, 1, 24), FP32, "sliced"),
    "norm of a transposed tensor": partial(check_norm, (4, 3, 24), FP32, "transposed"),
    "swiglu": partial(check_swiglu, (5, 1), 77, FP32),
    "swiglu wider than a block": partial(check_swiglu, (3,), 1030, FP32),
    "swiglu in bf16": partial(check_swiglu, (4,), 96, BF16),
    "swiglu of no rows": partial(check_swiglu, (0, 1), 77, FP32),
    "swiglu of a slice": partial(check_swiglu, (4, 1), 24, FP32, "sliced"),
    "swiglu of a transposed tensor": partial(check_swiglu, (4, 3), 24, FP32, "transposed"),
    "swiglu of experts": partial(check_swiglu_of_experts, 5, 77, FP32),
    "swiglu of experts, wide": partial(check_swiglu_of_experts, 3, 1030, FP32),
    "swiglu of experts in bf16": partial(check_swiglu_of_experts, 6, 64, BF16),
    "swiglu of experts without rows": partial(check_swiglu_of_experts, 0, 64, FP32),
    "heads": partial(check_heads, 7, 2, 2, 16, 16),
    "heads, one query each": partial(check_heads, 7, 4, 1, 16, 16, norm=False),
    "heads, many queries, many blocks": partial(check_heads, 3, 10, 8, 32, 32),
    "heads, half rotary, interleaved": partial(
        check_heads, 5, 2, 16, 32, 16, interleaved=True, norm=False
    ),
    "heads, half rotary, interleaved, normed": partial(
        check_heads, 5, 2, 3, 32, 16, interleaved=True
    ),
    "heads of 24, rotary 12": partial(check_heads, 7, 2, 3, 24, 12),
    "heads in bf16": partial(check_heads, 6, 2, 4, 32, 32, dtype=BF16),
    "heads of no tokens": partial(check_heads, 0, 2, 2, 16, 16),
    "heads of no tokens, not normed": partial(check_heads, 0, 2, 2, 16, 16, norm=False),
    "gathered rows": partial(check_gathered_rows, 9, 14, 77, FP32),
    "gathered rows in bf16": partial(check_gathered_rows, 9, 14, 64, BF16),
    "no gathered rows": partial(check_gathered_rows, 9, 0, 64, FP32),
    "log-probs": partial(check_log_probs, 5, 3000),
    "log-probs at a temperature": partial(check_log_probs, 4, 100, temperature=0.7),
    "log-probs of large logits": partial(check_log_probs, 4, 2500, offset=1e4),
    "log-probs of a later part": partial(check_log_probs, 6, 50, start=40),
    "log-probs of no rows": partial(check_log_probs, 0, 50),
    "log-probs summed plainly": partial(check_log_probs, 6, 50, plain_sum=True),
}


def main() -> None:
    """All checks, each from the same seed."""
    outcome: dict[str, str] = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            check()
            outcome[name] = ""
        except Exception:  # noqa: BLE001 - reported by the check's own test
            outcome[name] = traceback.format_exc()
    Path(sys.argv[1]).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
