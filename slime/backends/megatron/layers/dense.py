"""Layers that need neither TransformerEngine nor Apex."""

from functools import partial
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.typed_torch import apply_module
from torch import Tensor

from slime.backends.megatron.layers.kernels import rms_norm, rotate, swiglu
from slime.backends.megatron.packs.pack import Packed
from slime.backends.megatron.process.parallel import ready_weight


def parameter_device() -> torch.device:
    """Where this rank's parameters are made."""
    is_cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight is marked for sequence parallelism, so that its gradient is summed."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device())
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
        positions = max_seq_len.float() / (self.seq_len_interpolation_factor or 1.0)
        return token_angles(positions, self.inv_freq)


def token_angles(positions: Tensor, frequencies: Tensor, scale: float = 1.0) -> Tensor:
    """[2, T, 1, 1, D_rot / 2] fp32 cosines and sines of each token, times `scale`.

    Args:
        positions: [T], of each token in its own sequence.
        frequencies: [D_rot / 2], the angle of each pair at position 1.
    """
    device = positions.device
    angles = positions.float()[:, None] * frequencies.to(device, torch.float32)[None]
    table = torch.stack([angles.cos(), angles.sin()])[:, :, None, None, :]
    return table if scale == 1.0 else table * scale


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention with its forward pass written out for packed training.

    A subclass that overrides `get_query_key_value_tensors` changes heads before they are rotated.
    """

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
        query, key, value = self._heads(hidden_states, rotary_pos_emb)
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

    def _heads(self, hidden: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [T, 1, heads, D], normed and turned by `angles`."""
        if hidden.is_cuda and angles is not None and self._can_fuse():
            return self._fused_heads(hidden, angles)
        heads: Any = self.get_query_key_value_tensors(hidden)
        query, key, value = heads
        if angles is not None:
            cos, sin = angles.to(query.dtype).unbind(0)
            turn = partial(rotate, cos=cos, sin=sin, is_interleaved=self.config.rotary_interleaved)
            query, key = turn(query), turn(key)
        return query, key, value

    def _can_fuse(self) -> bool:
        """Whether one kernel may stand for `get_query_key_value_tensors` and the rotation."""
        is_stock = (
            type(self).get_query_key_value_tensors is SelfAttention.get_query_key_value_tensors
        )
        # Fewer groups than ranks: Megatron's own way gathers the projection.
        groups = self.config.num_query_groups or 0  # set by TransformerConfig
        return is_stock and groups >= self.config.tensor_model_parallel_size

    def _fused_heads(self, hidden: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from slime.backends.megatron.layers.fused.heads import HeadLayout, split_heads

        mixed, _ = apply_module(self.linear_qkv)(hidden)
        groups = self.num_query_groups_per_partition
        layout = HeadLayout(
            groups=groups,
            queries=self.num_attention_heads_per_partition // groups,
            size=self.hidden_size_per_attention_head,
            eps=self.config.layernorm_epsilon,
            is_interleaved=self.config.rotary_interleaved,
        )
        norms = None
        if isinstance(self.q_layernorm, RMSNorm) and isinstance(self.k_layernorm, RMSNorm):
            norms = ready_weight(self.q_layernorm), ready_weight(self.k_layernorm)
        cos, sin = angles.flatten(1).view(2, len(mixed), -1).unbind(0)
        query, key, value = split_heads(mixed.flatten(0, 1), cos, sin, norms, layout)
        return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)


class SwiGLUMLP(MLP):
    """Megatron's MLP for silu(gate) x up."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(output [T, 1, H], bias not yet added) from [T, 1, H]."""
        both, bias = apply_module(self.linear_fc1)(hidden_states)
        return apply_module(self.linear_fc2)(swiglu(both if bias is None else both + bias))


class PostNormLinear(RowParallelLinear):
    """A row-parallel projection with an RMSNorm after it, as GLM-4 has in both its branches.

    The norm sees whole rows: what the ranks computed is summed before.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        assert not config.add_bias_linear, "the bias would be added after the norm"
        self.post_layernorm = RMSNorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor]:
        """(normalized output [T, 1, H], None) from [T, 1, columns of this rank]."""
        output, bias = super().forward(input_)
        return self.post_layernorm(output), bias


def used_rows(config: Any, packed: PackedSeqParams | None) -> Tensor | None:
    """[N] rows that the MLP of the last layer computes; None = all.

    Args:
        config: of Megatron, its arguments or the transformer's.
    """
    outputs = packed.outputs if isinstance(packed, Packed) else None
    # With sequence parallelism a rank has only some of the rows; of none Megatron's router fails.
    if outputs is None or not len(outputs) or config.sequence_parallel:
        return None
    return outputs


class LastLayer(TransformerLayer):
    """The last layer of a model: its MLP or experts compute only tokens whose output is used.

    Prompts are most of a short sample, and in a model of two layers this MLP is a third of the work.
    """

    def _forward_mlp(
        self,
        hidden_states: Tensor,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Any:
        outputs = used_rows(self.config, packed_seq_params)
        if outputs is not None:
            hidden_states = hidden_states.index_select(0, outputs)
        return super()._forward_mlp(
            hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
        )
