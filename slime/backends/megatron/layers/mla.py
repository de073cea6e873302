"""Multi-latent attention (DeepSeek-V2, V3) of packs.

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; YaRN's angles, arXiv:2309.00071, are Megatron's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import YarnRotaryEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.typed_torch import apply_module
from torch import Tensor

from slime.backends.megatron.layers.dense import parameter_device, token_angles
from slime.backends.megatron.layers.kernels import rotate
from slime.backends.megatron.packs.pack import Packed


class ReplicatedLinear(torch.nn.Module):
    """A projection that every tensor-parallel rank has whole and applies to its own tokens."""

    def __init__(self, input_size: int, output_size: int, config: MLATransformerConfig) -> None:
        super().__init__()
        shape, dtype = (output_size, input_size), config.params_dtype
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=parameter_device()))
        # With sequence parallelism each rank sees some of the tokens: gradients are summed.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class PackedMLA(MLASelfAttention):
    """Megatron's multi-latent attention with replicated down projections and one pass over a pack.

    Megatron's own cuts the down projections over ranks, which without TransformerEngine loses part
    of the gradient of the rotary key. With tensor parallelism this one needs sequence parallelism:
    every rank then projects its own tokens only.
    """

    config: MLATransformerConfig

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        assert config.tensor_model_parallel_size == 1 or config.sequence_parallel
        hidden, rank = config.hidden_size, config.q_lora_rank
        if rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(hidden, rank, config)
        self.linear_kv_down_proj = ReplicatedLinear(
            hidden, config.kv_lora_rank + config.qk_pos_emb_head_dim, config
        )
        # A plain attribute: as a buffer it would turn bf16 with the model.
        self._frequencies, self._angle_scale = _frequencies(self.rotary_pos_emb)
        del self.rotary_pos_emb  # with its tables of 4096 positions

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """The classes of the spec; Megatron's choice wants TransformerEngine without a q latent."""
        projects_query = self.config.q_lora_rank is None
        return {
            "linear_q_proj": submodules.linear_q_proj if projects_query else IdentityOp,
            "linear_q_up_proj": IdentityOp if projects_query else submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": submodules.q_layernorm,
            "kv_layernorm": submodules.kv_layernorm,
        }

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Packed | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(output [T, 1, H], bias not yet added) from hidden states [T, 1, H]."""
        assert isinstance(packed_seq_params, Packed), "slime's attention runs on packs only"
        assert packed_seq_params.position_ids is not None
        query, key, value = self._heads(hidden_states, packed_seq_params.position_ids)
        if self.checkpoint_core_attention and self.training:
            context = self._checkpointed_attention_forward(
                query, key, value, attention_mask, packed_seq_params=packed_seq_params
            )
        else:
            context = self._run_core_attention(
                query, key, value, attention_mask, packed_seq_params=packed_seq_params
            )
        return apply_module(self.linear_proj)(context)

    def _heads(self, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key [T, 1, heads, D_nope + D_rot], value [T, 1, heads, D_v].

        All T tokens come out, also where sequence parallelism leaves only some of them to go in.
        """
        config = self.config
        rotary, plain = config.qk_pos_emb_head_dim, config.qk_head_dim
        angles = token_angles(positions, self._frequencies, self._angle_scale)
        cos, sin = angles.to(hidden_states.dtype).unbind(0)

        query = self._query(hidden_states).unflatten(-1, (-1, plain + rotary))
        query_plain, query_rotary = query.split([plain, rotary], -1)
        query_rotary = rotate(query_rotary, cos, sin, is_interleaved=True)

        down = self.linear_kv_down_proj(hidden_states)
        latent, key_rotary = down.split([config.kv_lora_rank, rotary], -1)
        if config.sequence_parallel:
            key_rotary = gather_from_sequence_parallel_region(key_rotary, group=self.tp_group)
        key_rotary = rotate(key_rotary.unsqueeze(2), cos, sin, is_interleaved=True)
        latent = apply_module(self.kv_layernorm)(latent.contiguous())  # kernels take whole rows
        both, _ = self.linear_kv_up_proj(latent)
        both = both.unflatten(-1, (-1, plain + config.v_head_dim))
        key_plain, value = both.split([plain, config.v_head_dim], -1)
        key_rotary = key_rotary.expand(-1, -1, key_plain.shape[2], -1)
        return (
            torch.cat([query_plain, query_rotary], -1),
            torch.cat([key_plain, key_rotary], -1),
            value,
        )

    def _query(self, hidden_states: Tensor) -> Tensor:
        """[T, 1, heads x (D_nope + D_rot)]."""
        if self.config.q_lora_rank is None:
            return self.linear_q_proj(hidden_states)[0]
        latent = apply_module(self.q_layernorm)(self.linear_q_down_proj(hidden_states))
        return self.linear_q_up_proj(latent)[0]

    def _run_core_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Any = None,
        attn_mask_type: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[T, 1, heads x D_v]."""
        core: Any = self.core_attention
        return core(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=attn_mask_type or self.attn_mask_type,
            attention_bias=None,
            packed_seq_params=packed_seq_params,
        )


def mla_submodules(
    config: MLATransformerConfig, *, norm: type, core_attention: type, linear_proj: Any
) -> MLASelfAttentionSubmodules:
    """What `PackedMLA` is made of; the down projections named here are replaced by it."""
    layer_norm = norm if config.qk_layernorm else IdentityOp
    return MLASelfAttentionSubmodules(
        linear_q_proj=ColumnParallelLinear,
        linear_q_down_proj=ColumnParallelLinear,
        linear_q_up_proj=ColumnParallelLinear,
        linear_kv_down_proj=ColumnParallelLinear,
        linear_kv_up_proj=ColumnParallelLinear,
        core_attention=core_attention,
        linear_proj=linear_proj,
        q_layernorm=layer_norm if config.q_lora_rank is not None else IdentityOp,
        kv_layernorm=layer_norm,
    )


def _frequencies(rotary: Any) -> tuple[Tensor, float]:
    """([D_rot / 2] fp32 angle per position, factor of cosine and sine) of a rotary embedding."""
    if not isinstance(rotary, YarnRotaryEmbedding):
        return rotary.inv_freq.float(), 1.0
    angles, scale = rotary.get_emb(2)
    return angles[1, 0, 0].chunk(2)[0].clone(), float(scale)  # twice over, those of position 1
