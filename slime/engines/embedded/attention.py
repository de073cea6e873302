"""Attention over the slot cache: `slots`, a transformers attention implementation for decoding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SLOTS = "slots"
# Attention variants that this function would compute wrongly; the caller then falls back to others.
_UNSUPPORTED = ("s_aux", "softcap", "position_bias")


def slots_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, Q, heads, head_dim] of scaled dot-product attention, with grouped queries.

    For one query token per row the keys stay a strided view of the cache: a batched product per
    key head, without the copy per query head that the general path makes.

    Args:
        query: [B, heads, Q, D]; key, value: [B, kv_heads, K, D] and [B, kv_heads, K, Dv].
        attention_mask: boolean, true where a query may look; broadcasts to [B, 1, Q, K].

    Raises:
        NotImplementedError: the model asks for attention sinks or soft-capping.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"`{SLOTS}` attention has no {name}")
    rows, heads, num_queries, dim = query.shape
    kv_heads = key.shape[1]
    scale = dim**-0.5 if scaling is None else scaling
    if num_queries > 1 or attention_mask is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scale,
            is_causal=attention_mask is None and num_queries > 1, enable_gqa=heads > kv_heads,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, dim) * scale
    scores = torch.matmul(grouped, key.transpose(2, 3)).float()
    scores.masked_fill_(~attention_mask, float("-inf"))
    out = torch.matmul(torch.softmax(scores, -1).to(value.dtype), value)
    return out.reshape(rows, 1, heads, value.shape[-1]), None


def register_slots_attention() -> None:
    """Make `slots` known to transformers; masks are those of sdpa (boolean)."""
    from transformers import masking_utils, modeling_utils

    functions: Any = modeling_utils.ALL_ATTENTION_FUNCTIONS
    masks: Any = masking_utils
    functions.register(SLOTS, slots_attention)
    masks.ALL_MASK_ATTENTION_FUNCTIONS.register(SLOTS, masks.sdpa_mask)
