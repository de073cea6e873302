"""Causal attention over packs: variable-length kernels in half precision, padded batches in fp32."""

import functools
import logging
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.backends.megatron.layers.kernels import put_back, take
from slime.backends.megatron.packs.pack import Packed, PaddedLayout

logger = logging.getLogger(__name__)

# Head sizes that flash-attn-4 computes forward and backward on Hopper.
_FA4_HEAD_SIZES = (64, 96, 128)


class VarlenAttention(MegatronModule):
    """Causal attention of a pack, each sequence to itself; grouped queries as they are."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        channels = k_channels or config.kv_channels
        assert channels is not None, "set by TransformerConfig"
        self.scale = softmax_scale or channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """[T, 1, heads x D_v] from queries and keys [T, 1, heads, D] and values [T, 1, heads, D_v]."""
        assert isinstance(packed_seq_params, Packed), "slime's attention runs on packs only"
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        plan = packed_seq_params.context
        if plan is not None:
            both = plan.gather_keys(torch.cat([k, v], -1))
            k, v = both.split([k.shape[-1], v.shape[-1]], -1)
        if packed_seq_params.padded is not None:
            out = _padded_attention(q, k, v, packed_seq_params.padded, self.scale)
        elif plan is not None and q.dtype == torch.float32:
            out = _span_attention(q, k, v, plan.lengths, self.scale)
        else:
            out = _varlen_attention(q, k, v, packed_seq_params, self.scale)
        return out.reshape(out.shape[0], 1, -1)


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float) -> Tensor:
    """[T, heads, D_v] by a variable-length kernel, CUDA only: flash-attn-4 where it fits, else torch's.

    Neither takes values narrower than queries, as latent attention has: zeros make them as wide.
    """
    narrow, wide = v.shape[-1], q.shape[-1]
    if narrow < wide:
        return _varlen_attention(q, k, F.pad(v, (0, wide - narrow)), packed, scale)[..., :narrow]
    kernel = flash_attention_4()
    if kernel is not None and q.shape[-1] in _FA4_HEAD_SIZES and v.shape[-1] in _FA4_HEAD_SIZES:
        return kernel(
            q,
            k,
            v,
            cu_seqlens_q=packed.cu_seqlens_q,
            cu_seqlens_k=packed.cu_seqlens_kv,
            max_seqlen_q=packed.max_seqlen_q,
            max_seqlen_k=packed.max_seqlen_kv,
            softmax_scale=scale,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )[0]
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k,
        v,
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0),  # causal
    )
    assert isinstance(out, Tensor)
    return out


@functools.cache
def flash_attention_4() -> Any:
    """flash-attn-4's variable-length function, or None where it is not installed."""
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return None
    # They warn of their own deprecations whenever a kernel is compiled.
    for package in ("flash_attn", "cutlass"):
        warnings.filterwarnings("ignore", module=package)
    try:
        from flash_attn.cute.interface import (  # pyright: ignore[reportMissingImports]
            flash_attn_varlen_func,
        )
    except ImportError as error:
        logger.warning(
            "flash-attn-4 is installed but cannot be imported (%s); torch's attention is used, which "
            "takes about twice as long",
            error,
        )
        return None
    return flash_attn_varlen_func


def _padded_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PaddedLayout, scale: float
) -> Tensor:
    """[T, heads, D] by batched attention over padded sequences.

    Padding comes last and attention is causal, so no real token ever sees it and no mask is needed;
    the outputs of padding are dropped, which leaves it without gradient. So are a shared prompt's
    outputs in all sequences but its first, while every response sends gradients to its keys and
    values.
    """
    sizes = [count * length for count, length in layout.buckets]
    q_slots = take(q, layout.gather, layout.scatter).split(sizes)
    k_slots, v_slots = (
        take(x, layout.gather, layout.scatter, layout.copies).split(sizes) for x in (k, v)
    )
    outs = [
        _batched_attention(one, two, three, bucket, scale)
        for one, two, three, bucket in zip(q_slots, k_slots, v_slots, layout.buckets, strict=True)
    ]
    return put_back(outs[0] if len(outs) == 1 else torch.cat(outs), layout.scatter)


def _batched_attention(
    q: Tensor, k: Tensor, v: Tensor, bucket: tuple[int, int], scale: float
) -> Tensor:
    """[slots, heads, D] of one bucket."""
    q, k, v = (x.view(*bucket, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)


def _span_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[tuple[int, int], ...], scale: float
) -> Tensor:
    """[T, heads, D] one span after the other: queries are the last positions of their keys."""
    num_queries, num_keys = zip(*lengths, strict=True)
    outs: list[Tensor] = []
    for one, two, three in zip(
        q.split(num_queries), k.split(num_keys), v.split(num_keys), strict=True
    ):
        is_seen = q.new_ones(len(one), len(two), dtype=torch.bool).tril(len(two) - len(one))
        out = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (one, two, three)),
            attn_mask=is_seen,
            scale=scale,
            enable_gqa=one.shape[1] != two.shape[1],
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
