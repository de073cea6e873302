"""Log-probs and entropy straight from hidden states and the output weight: no [T, V] tensor.

A pack of 32,768 tokens has 9.3 GiB of logits in bf16 at a vocabulary of 151,936, and fp32 copies
and gradients of them besides. Here logits exist for one chunk of rows at a time, in fp32, and are
computed again for the backward pass; the weight's gradient is added where it belongs, piece by
piece.

Source: the idea of a cross-entropy fused with the output layer, in chunks: Wijmans et al. 2024,
"Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from slime.training.log_probs import (
    ChunkLayout,
    backward_chunk,
    forward_chunk,
    true_columns,
    work_dtype,
)

# fp32 logits of one chunk; backward holds two of these, and half of one in the weight's dtype. On an
# H200 half as much took 17 % longer, twice as much was 6 % faster (benchmarks/results).
_CHUNK_BYTES = 512 * 2**20
# On a CPU; not measured.
_CPU_CHUNK_BYTES = 32 * 2**20
# Rows of the weight whose fp32 gradient exists apart from the buffer it is added to.
_WEIGHT_ROWS = 16_384


@dataclass(frozen=True)
class OutputWeight:
    """The output layer's weight and where its gradient goes.

    Attributes:
        weight: [V, H], or [V / n, H] of this rank.
        gradient: [V, H] buffer, usually fp32, to which the backward pass adds; None: the gradient
            is returned to autograd in the weight's dtype.
    """

    weight: Tensor
    gradient: Tensor | None = None


def linear_log_probs_and_entropy(
    hidden: Tensor,
    output: OutputWeight,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    needs_entropy: bool = False,
    chunk_size: int = -1,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    vocab_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(log-prob of each target, entropy of each distribution), natural log, fp32.

    As `log_probs_and_entropy` of `hidden @ weight.T`, with fp32 logits.

    Args:
        hidden: [T, H]; its gradient is complete only after a sum over `vocab_group`, which the
            caller owes, as after any column-parallel layer.
        targets: [T] int64 ids of the whole vocabulary.
        chunk_size: rows per chunk; -1 = by memory. Changes no result but by the order of sums in
            the weight's gradient.
        Others: as `log_probs_and_entropy`.

    Returns:
        [T] log-probs and [T] entropy or None, fp32; fp64 if the hidden states are fp64.
    """
    num_columns = true_columns(output.weight.shape[0], vocab_size, vocab_start)
    layout = ChunkLayout(
        temperature=temperature,
        needs_entropy=needs_entropy,
        rows=_chunk_rows(chunk_size, hidden, num_columns),
        num_columns=num_columns,
        start=vocab_start,
        group=vocab_group,
    )
    # `apply` has no types in torch.
    outputs = cast(Any, _LinearLogProbs).apply(
        hidden, output.weight, targets, output.gradient, layout
    )
    return cast(tuple[Tensor, Tensor | None], outputs)


def _chunk_rows(chunk_size: int, hidden: Tensor, num_columns: int) -> int:
    if chunk_size > 0:
        return chunk_size
    chunk_bytes = _CPU_CHUNK_BYTES if hidden.device.type == "cpu" else _CHUNK_BYTES
    rows = max(chunk_bytes // (4 * max(num_columns, 1)), 1)
    # Whole tiles of the product.
    return rows // 128 * 128 if rows >= 128 else rows


class _LinearLogProbs(torch.autograd.Function):
    """Saves hidden states and, [T] each, largest logit, log-normaliser and entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        gradient: Tensor | None,
        layout: ChunkLayout,
    ) -> tuple[Tensor, Tensor | None]:
        log_probs = torch.empty(hidden.shape[0], dtype=work_dtype(hidden), device=hidden.device)
        top, log_norm = torch.empty_like(log_probs), torch.empty_like(log_probs)
        entropy = torch.empty_like(log_probs) if layout.needs_entropy else None
        for chunk in layout.chunks(hidden.shape[0]):
            x = _scaled_logits(hidden[chunk], weight, layout)
            log_probs[chunk], top[chunk], log_norm[chunk], chunk_entropy = forward_chunk(
                x, targets[chunk], layout
            )
            if entropy is not None and chunk_entropy is not None:
                entropy[chunk] = chunk_entropy
        ctx.layout = layout
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, top, log_norm, entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_log_probs, grad_entropy = grad_outputs
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None, None, None
        layout: ChunkLayout = ctx.layout
        hidden, weight, targets, top, log_norm, entropy = ctx.saved_tensors
        sums: Tensor | None = ctx.gradient
        if sums is None and ctx.needs_input_grad[1]:
            sums = torch.zeros(weight.shape, dtype=work_dtype(weight), device=weight.device)
        grad_hidden = torch.empty_like(hidden)
        columns = weight[: layout.num_columns]
        for chunk in layout.chunks(hidden.shape[0]):
            log_p = _scaled_logits(hidden[chunk], weight, layout)
            part = backward_chunk(
                log_p.sub_(top[chunk, None]).sub_(log_norm[chunk, None]),
                layout.local(targets[chunk]),
                None if grad_log_probs is None else grad_log_probs[chunk],
                None if grad_entropy is None else (grad_entropy[chunk], entropy[chunk]),
            )
            grad_logits = part.div_(layout.temperature).to(weight.dtype)
            del log_p, part
            grad_hidden[chunk] = grad_logits @ columns
            if sums is not None:
                _add_weight_gradient(sums, grad_logits, hidden[chunk])
        is_returned = sums is not None and ctx.gradient is None
        grad_weight = cast(Tensor, sums).to(weight.dtype) if is_returned else None
        return grad_hidden, grad_weight, None, None, None


def _scaled_logits(hidden: Tensor, weight: Tensor, layout: ChunkLayout) -> Tensor:
    """[n, columns] fp32 logits divided by the temperature."""
    logits = _product(hidden, weight[: layout.num_columns].t())
    return logits if layout.temperature == 1.0 else logits.div_(layout.temperature)


def _add_weight_gradient(sums: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits^T @ hidden to `sums`, some rows of the weight at a time."""
    for start in range(0, grad_logits.shape[1], _WEIGHT_ROWS):
        columns = grad_logits[:, start : start + _WEIGHT_ROWS]
        sums[start : start + columns.shape[1]] += _product(columns.t(), hidden)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32; of half-precision factors with fp32 sums and without rounding the result."""
    if a.dtype == work_dtype(a):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
