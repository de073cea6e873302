"""Log-probs and entropy from logits, in chunks, over a vocabulary that ranks may share."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

# Of fp32 per chunk. On a CPU a chunk should stay in the cache: [1024, 32768] bf16 on one thread
# took 0.29 s forward and backward with 4 MiB, 0.86 s with 64 MiB (medians of 7, on a busy
# machine). That a GPU wants fewer, larger kernels is an assumption; it has not been measured.
_CPU_CHUNK_BYTES = 4 * 2**20
_GPU_CHUNK_BYTES = 64 * 2**20


def log_probs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    needs_entropy: bool = False,
    chunk_size: int = -1,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    vocab_group: dist.ProcessGroup | None = None,
    overwrite_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(log-prob of each target, entropy of each distribution), natural log, fp32.

    The work goes through T in chunks; besides the logits themselves (kept as they are, in their own
    dtype, for the backward pass) only one chunk exists in fp32. The backward pass needs one
    gradient of the size and dtype of the logits, or none with `overwrite_logits`.

    Args:
        logits: [T, V], or [T, V / n] of this rank; any float dtype; carries the gradient.
        targets: [T] int64 ids of the whole vocabulary.
        temperature: logits are divided by it first.
        needs_entropy: also return the entropy; its gradient costs nothing unless it is used.
        chunk_size: rows per chunk; -1 = a few MiB of fp32. Changes no result.
        vocab_size: true size of the vocabulary; later columns are padding and get probability 0.
        vocab_start: id of this rank's first column.
        vocab_group: ranks that share the vocabulary; all of them call this with the same targets
            and the same `chunk_size`, and get the same answer. The gradient that flows back is
            expected to be the same on all of them too, as in Megatron's vocab-parallel
            cross-entropy.
        overwrite_logits: the backward pass writes the gradient into `logits`. Only if nothing else
            reads them, and backward runs once.

    Returns:
        [T] log-probs and [T] entropy or None; fp64 if the logits are fp64.
    """
    num_columns = true_columns(logits.shape[1], vocab_size, vocab_start)
    layout = ChunkLayout(
        temperature=temperature,
        needs_entropy=needs_entropy,
        rows=_chunk_rows(chunk_size, logits),
        num_columns=num_columns,
        start=vocab_start,
        group=vocab_group,
        overwrite=overwrite_logits,
    )
    # `apply` has no types in torch.
    outputs = cast(Any, _LogProbs).apply(logits, targets, layout)
    return cast(tuple[Tensor, Tensor | None], outputs)


@dataclass(frozen=True, kw_only=True)
class ChunkLayout:
    """Arguments of one call, besides the tensors; shared with `linear_log_probs.py`."""

    temperature: float
    needs_entropy: bool
    rows: int
    num_columns: int
    start: int
    group: dist.ProcessGroup | None
    overwrite: bool = False

    def chunks(self, num_rows: int) -> list[slice]:
        return [slice(i, min(i + self.rows, num_rows)) for i in range(0, num_rows, self.rows)]

    def scaled(self, logits: Tensor, chunk: slice) -> Tensor:
        """A fp32 copy of the chunk's true columns, divided by the temperature."""
        part = logits[chunk, : self.num_columns]
        copy = part.to(work_dtype(logits), copy=True)
        return copy if self.temperature == 1.0 else copy.div_(self.temperature)

    def local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(column of each target here, whether it is here); 0 where it is not."""
        column = targets - self.start
        is_here = (column >= 0) & (column < self.num_columns)
        return torch.where(is_here, column, 0), is_here

    def reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        if self.group is not None:
            cast(Any, dist).all_reduce(tensor, op, group=self.group)
        return tensor


def work_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32: what sums are made in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def true_columns(width: int, vocab_size: int | None, vocab_start: int) -> int:
    """How many of a rank's `width` columns belong to the vocabulary; the rest is padding."""
    return width if vocab_size is None else min(width, max(vocab_size - vocab_start, 0))


def _chunk_rows(chunk_size: int, logits: Tensor) -> int:
    if chunk_size > 0:
        return chunk_size
    chunk_bytes = _CPU_CHUNK_BYTES if logits.device.type == "cpu" else _GPU_CHUNK_BYTES
    return max(chunk_bytes // (4 * max(logits.shape[1], 1)), 1)


class _LogProbs(torch.autograd.Function):
    """Saves logits and, [T] each, largest logit, log-normaliser, entropy; p is recomputed.

    The largest logit and the log of the sum beside it stay apart: added up, logits of 1e4 would
    leave the sum three digits in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, layout: ChunkLayout
    ) -> tuple[Tensor, Tensor | None]:
        work = work_dtype(logits)
        log_probs = torch.empty(logits.shape[0], dtype=work, device=logits.device)
        top, log_norm = torch.empty_like(log_probs), torch.empty_like(log_probs)
        entropy = torch.empty_like(log_probs) if layout.needs_entropy else None
        for chunk in layout.chunks(logits.shape[0]):
            log_probs[chunk], top[chunk], log_norm[chunk], chunk_entropy = forward_chunk(
                layout.scaled(logits, chunk), targets[chunk], layout
            )
            if entropy is not None and chunk_entropy is not None:
                entropy[chunk] = chunk_entropy
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, top, log_norm, entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, None, None]:
        grad_log_probs, grad_entropy = grad_outputs
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None
        layout: ChunkLayout = ctx.layout
        logits, targets, top, log_norm, entropy = ctx.saved_tensors
        grad = logits.detach() if layout.overwrite else torch.empty_like(logits)
        for chunk in layout.chunks(logits.shape[0]):
            part = backward_chunk(
                layout.scaled(logits, chunk).sub_(top[chunk, None]).sub_(log_norm[chunk, None]),
                layout.local(targets[chunk]),
                None if grad_log_probs is None else grad_log_probs[chunk],
                None if grad_entropy is None else (grad_entropy[chunk], entropy[chunk]),
            )
            # Casts to the dtype of the logits, as autograd would.
            grad[chunk, : layout.num_columns] = part.div_(layout.temperature)
        grad[:, layout.num_columns :] = 0.0
        return grad, None, None


def forward_chunk(
    x: Tensor, targets: Tensor, layout: ChunkLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of one chunk, [n] each: log-probs, largest logit, log of the sum beside it, entropy.

    Args:
        x: [n, columns] scaled logits, overwritten.
        targets: [n].
    """
    top = x.amax(dim=1) if x.shape[1] else x.new_full((x.shape[0],), -torch.inf)
    layout.reduce(top, dist.ReduceOp.MAX)
    x.sub_(top[:, None])
    weights = x.exp()
    sums = [_target_logit(x, *layout.local(targets)), weights.sum(dim=1)]
    if layout.needs_entropy:
        # A column at -inf has weight 0 and adds nothing; 0 x -inf would be NaN.
        sums.append(weights.mul_(x.clamp_(min=torch.finfo(x.dtype).min)).sum(dim=1))
    total = layout.reduce(torch.stack(sums))
    log_norm = total[1].log()
    entropy = log_norm - total[2] / total[1] if layout.needs_entropy else None
    return total[0] - log_norm, top, log_norm, entropy


def _target_logit(x: Tensor, column: Tensor, is_here: Tensor) -> Tensor:
    if x.shape[1] == 0:  # a rank that holds nothing but padding
        return x.new_zeros(x.shape[0])
    return torch.where(is_here, x.gather(1, column[:, None]).squeeze(1), 0.0)


def backward_chunk(
    log_p: Tensor,
    target: tuple[Tensor, Tensor],
    grad_log_probs: Tensor | None,
    entropy_terms: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """[n, V] gradient of one chunk with respect to the scaled logits; overwrites `log_p`.

    d log p_t / dx = onehot - p;  d H / dx = -p (log p + H).
    """
    p = log_p.exp()
    if grad_log_probs is None:
        grad = torch.zeros_like(p)
    else:
        grad = p * -grad_log_probs[:, None]
        if p.shape[1]:
            column, is_here = target
            grad.scatter_add_(
                1, column[:, None], torch.where(is_here, grad_log_probs, 0.0)[:, None]
            )
    if entropy_terms is not None:
        grad_entropy, entropy = entropy_terms
        log_p.clamp_(min=torch.finfo(log_p.dtype).min).add_(entropy[:, None])
        grad -= p.mul_(log_p).mul_(grad_entropy[:, None])
    return grad
