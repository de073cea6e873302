"""Layers that need neither TransformerEngine nor Apex, and the spec of a dense model.

The parameters' names and shapes are those of Megatron's own local spec, so checkpoints of stock
Megatron load.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.typed_torch import apply_module
from torch import Tensor

from slime.backends.megatron.kernels import put_back, rms_norm, rotate, swiglu, take
from slime.backends.megatron.pack import Packed, PaddedLayout


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight is marked for sequence parallelism, so that its gradient is summed."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any
    ) -> None:
        super().__init__()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class PackedRotary(RotaryEmbedding):
    """Rotary angles of each token of a pack: one gather for all layers, no loop over sequences."""

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> Any:
        """The positions of the pack, which GPTModel hands to `forward`."""
        packed = args[4] if len(args) > 4 else kwargs.get("packed_seq_params")
        if isinstance(packed, Packed):
            return packed.position_ids
        return super().get_rotary_seq_len(*args, **kwargs)

    # The stock method is cached by its arguments; positions are not worth a cache.
    def forward(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, max_seq_len: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        """[2, T, 1, 1, D_rot / 2] fp32 cosines and sines for positions [T], else stock angles."""
        if not isinstance(max_seq_len, Tensor):
            return super().forward(max_seq_len, *args, **kwargs)
        frequencies = self.inv_freq.to(max_seq_len.device).float()
        positions = max_seq_len.float() / (self.seq_len_interpolation_factor or 1.0)
        angles = positions[:, None] * frequencies[None]
        return torch.stack([angles.cos(), angles.sin()])[:, :, None, None, :]


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention with its forward pass written out for packed training."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Packed | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(output [T, 1, H], bias not yet added) from hidden states [T, 1, H]."""
        assert isinstance(packed_seq_params, Packed), "slime's attention runs on packs only"
        heads: Any = self.get_query_key_value_tensors(hidden_states)
        query, key, value = heads
        if rotary_pos_emb is not None:
            cos, sin = rotary_pos_emb.to(query.dtype).unbind(0)
            turn = partial(rotate, cos=cos, sin=sin, is_interleaved=self.config.rotary_interleaved)
            query, key = turn(query), turn(key)
        if self.checkpoint_core_attention and self.training:
            context = self._checkpointed_attention_forward(
                query, key, value, attention_mask, packed_seq_params=packed_seq_params
            )
        else:
            context = apply_module(self.core_attention)(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=self.attn_mask_type,
                attention_bias=None,
                packed_seq_params=packed_seq_params,
            )
        return apply_module(self.linear_proj)(context)


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
        """[T, 1, heads x D] from [T, 1, heads, D]."""
        assert isinstance(packed_seq_params, Packed), "slime's attention runs on packs only"
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if packed_seq_params.padded is None:
            out = _varlen_attention(q, k, v, packed_seq_params, self.scale)
        else:
            out = _padded_attention(q, k, v, packed_seq_params.padded, self.scale)
        return out.reshape(out.shape[0], 1, -1)


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float) -> Tensor:
    """[T, heads, D] by torch's variable-length kernel, CUDA only."""
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


class SwiGLUMLP(MLP):
    """Megatron's MLP for silu(gate) x up."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(output [T, 1, H], bias not yet added) from [T, 1, H]."""
        both, bias = apply_module(self.linear_fc1)(hidden_states)
        return apply_module(self.linear_fc2)(swiglu(both if bias is None else both + bias))


class LastLayer(TransformerLayer):
    """The last layer of a model: its MLP computes only the tokens whose output is used.

    Prompts are most of a short sample, and in a model of two layers this MLP is a third of the work.
    """

    def _forward_mlp(
        self,
        hidden_states: Tensor,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Any:
        outputs = packed_seq_params.outputs if isinstance(packed_seq_params, Packed) else None
        # With sequence parallelism a rank has only some of the rows.
        if outputs is not None and not self.config.sequence_parallel:
            hidden_states = hidden_states.index_select(0, outputs)
        return super()._forward_mlp(
            hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
        )


def dense_layer_spec(config: TransformerConfig, *, is_last: bool = False) -> ModuleSpec:
    """One layer: RMSNorm, self-attention, RMSNorm, MLP, each with its residual."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    is_swiglu = config.gated_linear_unit and config.activation_func == F.silu
    mlp = SwiGLUMLP if is_swiglu else MLP
    residual: Any = get_bias_dropout_add
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=VarlenAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(
        module=LastLayer if is_last else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=PackedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=residual,
            pre_mlp_layernorm=RMSNorm,
            mlp=partial(
                mlp.as_mlp_submodule,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=residual,
            # Names on disk are those of the fused layers of TransformerEngine, as in stock specs.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def dense_block_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, and the final norm."""
    num_layers = get_num_layers_to_build(config, vp_stage)
    first = get_transformer_layer_offset(config, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[
            dense_layer_spec(config, is_last=first + i + 1 == config.num_layers)
            for i in range(num_layers)
        ],
        layer_norm=RMSNorm,
    )
