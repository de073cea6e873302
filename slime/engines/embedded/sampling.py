"""Tokens and their log-probs from logits, with SGLang's meaning of every sampling parameter."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slime.engines.embedded.arrays import as_tensor
from slime.engines.protocol import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Sampling parameters of a batch, one entry per row, [B].

    Attributes:
        uniform: numbers in [0, 1) that decide the tokens.
    """

    temperature: NDArray[np.float32]
    top_p: NDArray[np.float32]
    top_k: NDArray[np.int64]
    min_p: NDArray[np.float32]
    uniform: NDArray[np.float64]


def sample(
    logits: Tensor, columns: SamplingColumns
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """One token per row and its log-prob under softmax(logits / temperature).

    The log-prob is taken *before* top-k, top-p and min-p cut the distribution, as SGLang does: the
    trainer computes the same quantity.

    Args:
        logits: [B, V] fp32; penalties already applied.

    Returns:
        tokens [B] and log-probs [B], natural log; NaN where the logits are not finite.
    """
    scaled = logits
    if (columns.temperature != 1.0).any():
        scaled = logits / as_tensor(columns.temperature)[:, None]
    normalizer = torch.logsumexp(scaled, -1, keepdim=True)
    tokens = _choose(scaled, normalizer, columns)
    log_probs = (scaled.gather(1, tokens[:, None]) - normalizer)[:, 0]
    return tokens.numpy(), log_probs.numpy()


def _choose(scaled: Tensor, normalizer: Tensor, columns: SamplingColumns) -> Tensor:
    """[B] tokens; rows with the same needs are handled together."""
    is_greedy = columns.top_k == 1
    if is_greedy.all():
        return scaled.argmax(-1)
    probs = torch.exp(scaled - normalizer)
    is_cut = (columns.top_k < scaled.shape[1]) | (columns.top_p < 1.0) | (columns.min_p > 0.0)
    tokens = _invert_cdf(probs.cumsum(-1), columns.uniform)
    if not is_cut.any():
        return tokens
    if is_greedy.any():
        rows = as_tensor(np.flatnonzero(is_greedy))
        tokens[rows] = scaled[rows].argmax(-1)
    is_cut &= ~is_greedy
    if is_cut.any():
        chosen = np.flatnonzero(is_cut)
        rows = as_tensor(chosen)
        tokens[rows] = _choose_truncated(probs[rows], columns, chosen)
    return tokens


def _choose_truncated(probs: Tensor, columns: SamplingColumns, chosen: NDArray[np.int64]) -> Tensor:
    """[b] tokens from the part of each distribution that top-k, top-p and min-p keep.

    All three look at the untruncated distribution, sorted; a token stays if every one keeps it.
    """
    ordered, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    rank = torch.arange(probs.shape[1])[None]
    keep = rank < as_tensor(columns.top_k[chosen])[:, None]
    keep &= before <= as_tensor(columns.top_p[chosen])[:, None]
    keep &= ordered >= ordered[:, :1] * as_tensor(columns.min_p[chosen])[:, None]
    keep[:, 0] = True
    place = _invert_cdf((ordered * keep).cumsum(-1), columns.uniform[chosen])
    return ids.gather(1, place[:, None])[:, 0]


def _invert_cdf(cumulative: Tensor, uniform: NDArray[np.float64]) -> Tensor:
    """[B] first column whose cumulative weight exceeds uniform x total; never one of weight 0."""
    total = cumulative[:, -1]
    target = as_tensor(uniform).to(total.dtype) * total
    # Rounding can lift the target to the total itself, beyond every column.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return place.clamp_(max=cumulative.shape[1] - 1)


def edit_logits(
    row: Tensor, params: SamplingParams, generated: NDArray[np.int32], stop_ids: Sequence[int]
) -> None:
    """Apply penalties and `min_new_tokens` to one row in place, as SGLang does before scaling.

    Args:
        row: [V] fp32 logits.
        generated: tokens of the answer so far; the prompt is not penalised.
        stop_ids: end the answer; impossible while it has fewer than `min_new_tokens` tokens.
    """
    if params.has_penalties and len(generated):
        counts = as_tensor(np.bincount(generated, minlength=row.shape[0]))
        seen = counts > 0
        row -= params.frequency_penalty * counts + params.presence_penalty * seen
        scale = params.repetition_penalty
        row.copy_(torch.where(seen, torch.where(row > 0, row / scale, row * scale), row))
    if len(generated) < params.min_new_tokens:
        row[list(stop_ids)] = -torch.inf
