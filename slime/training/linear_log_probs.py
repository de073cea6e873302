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
        marks_buffer: tell the hooks of Megatron's gradient buffers that `gradient` is complete: set
            `weight.grad_added_to_main_grad` and return the weight itself, whose values nobody
            reads, as the gradient that such a hook wants to see.
    """

    weight: Tensor
    gradient: Tensor | None = None
    marks_buffer: bool = False


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
    outputs = cast(Any, _LinearLogProbs).apply(hidden, output.weight, targets, output, layout)
    return cast(tuple[Tensor, Tensor | None], outputs)


def _chunk_rows(chunk_size: int, hidden: Tensor, num_columns: int) -> int:
    if chunk_size > 0:
        return chunk_size
    chunk_bytes = _CPU_CHUNK_BYTES if hidden.device.type == "cpu" else _CHUNK_BYTES
    rows = max(chunk_bytes // (4 * max(num_columns, 1)), 1)
    # Whole tiles of the product.
    return rows // 128 * 128 if rows >= 128 else rows


class _LinearLogProbs(torch.autograd.Function):
    """Saves hidden states and, [T] each, largest logit, log-normaliser and entropy.

    Logits that fit into one chunk on a CPU are kept, less their largest: there a second product
    costs more than the memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        output: OutputWeight,
        layout: ChunkLayout,
    ) -> tuple[Tensor, Tensor | None]:
        log_probs = torch.empty(hidden.shape[0], dtype=work_dtype(hidden), device=hidden.device)
        top, log_norm = torch.empty_like(log_probs), torch.empty_like(log_probs)
        entropy = torch.empty_like(log_probs) if layout.needs_entropy else None
        kept: Tensor | None = None
        for chunk in layout.chunks(hidden.shape[0]):
            x = _product(hidden[chunk], weight[: layout.num_columns].t())
            if layout.rows >= hidden.shape[0] and not x.is_cuda:
                kept = x
            log_probs[chunk], top[chunk], log_norm[chunk], chunk_entropy = _forward_chunk(
                x, targets[chunk], layout
            )
            if entropy is not None and chunk_entropy is not None:
                entropy[chunk] = chunk_entropy
        ctx.layout = layout
        ctx.output = output
        ctx.kept = kept
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
        output: OutputWeight = ctx.output
        sums = output.gradient
        if sums is None and ctx.needs_input_grad[1]:
            sums = torch.zeros(weight.shape, dtype=work_dtype(weight), device=weight.device)
        grad_hidden = torch.empty_like(hidden)
        columns = weight[: layout.num_columns]
        for chunk in layout.chunks(hidden.shape[0]):
            grad_logits = _backward_chunk(
                _product(hidden[chunk], columns.t()) if ctx.kept is None else None,
                ctx.kept,
                targets[chunk],
                layout,
                (top[chunk], log_norm[chunk]),
                None if grad_log_probs is None else grad_log_probs[chunk],
                None if grad_entropy is None else (grad_entropy[chunk], entropy[chunk]),
                weight.dtype,
            )
            grad_hidden[chunk] = grad_logits @ columns
            if sums is not None:
                _add_weight_gradient(sums, grad_logits, hidden[chunk])
        ctx.kept = None
        return grad_hidden, _weight_gradient(weight, sums, output), None, None, None


def _weight_gradient(weight: Tensor, sums: Tensor | None, output: OutputWeight) -> Tensor | None:
    """What autograd gets for the weight."""
    if output.gradient is None:
        return None if sums is None else sums.to(weight.dtype)
    if not output.marks_buffer:
        return None
    cast(Any, weight).grad_added_to_main_grad = True
    return weight.detach()


def _forward_chunk(
    x: Tensor, targets: Tensor, layout: ChunkLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `forward_chunk`, from [n, columns] logits; on a CPU they are scaled and shifted in place."""
    if x.is_cuda:
        from slime.training import log_probs_triton

        return log_probs_triton.forward_chunk(x, targets, layout)
    if layout.temperature != 1.0:
        x.div_(layout.temperature)
    return forward_chunk(x, targets, layout)


def _backward_chunk(
    x: Tensor | None,
    shifted: Tensor | None,
    targets: Tensor,
    layout: ChunkLayout,
    statistics: tuple[Tensor, Tensor],
    grad_log_probs: Tensor | None,
    entropy_terms: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """[n, columns] of `dtype`: the gradient of the logits.

    Args:
        x: the logits again, overwritten; or None with
        shifted: what `_forward_chunk` left of them on a CPU, overwritten.
        statistics: [n] largest scaled logit and log of the sum beside it.
    """
    top, log_norm = statistics
    if x is not None and x.is_cuda:
        from slime.training import log_probs_triton

        return log_probs_triton.backward_chunk(
            x, targets, layout, statistics, grad_log_probs, entropy_terms, dtype
        )
    if x is not None:
        shifted = (x if layout.temperature == 1.0 else x.div_(layout.temperature)).sub_(
            top[:, None]
        )
    assert shifted is not None, "either logits or what was kept of them"
    log_p = shifted.sub_(log_norm[:, None])
    grad = backward_chunk(log_p, layout.local(targets), grad_log_probs, entropy_terms)
    return grad.div_(layout.temperature).to(dtype)


def _add_weight_gradient(sums: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits^T @ hidden to `sums`, some rows of the weight at a time."""
    for start in range(0, grad_logits.shape[1], _WEIGHT_ROWS):
        columns = grad_logits[:, start : start + _WEIGHT_ROWS]
        add_product(sums[start : start + columns.shape[1]], columns.t(), hidden)


def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums += a @ b, by the product itself where it can; into fp32 sums nothing is rounded before."""
    if a.dtype == sums.dtype:
        sums.addmm_(a, b)
    elif sums.is_cuda and sums.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(sums, a, b, torch.float32, out=sums)
    else:
        sums += _product(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32; of half-precision factors with fp32 sums and without rounding the result."""
    if a.dtype == work_dtype(a):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
