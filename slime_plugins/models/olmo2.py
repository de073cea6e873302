"""OLMo 2: norms after attention and MLP, none before; query and key normed over all heads at once.

Source: OLMo et al. 2025, arXiv:2501.00656, section 3.
"""

import argparse
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from slime.backends.megatron.layers import PackedSelfAttention, parameter_device
from slime.backends.megatron.specs import LayerStyle, block_spec
from slime.errors import ConfigError


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm over all heads of a token, of which each tensor-parallel rank has some.

    Args:
        num_heads: of all ranks together.
        head_dim: numbers of a head.
    """

    def __init__(self, config: TransformerConfig, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.size, self.eps = num_heads * head_dim, config.layernorm_epsilon
        local = self.size // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(
            torch.ones(local, dtype=config.params_dtype, device=parameter_device())
        )
        # Each rank has a part of its own: the norm of all gradients counts every one.
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads: Tensor) -> Tensor:
        """[T, 1, heads of this rank, D], normed; T are the tokens of all ranks."""
        wide = heads.float()
        squares = wide.square().sum((-2, -1), keepdim=True)
        # Summed over ranks forwards, and backwards too: the sum scales the heads of every rank.
        squares = reduce_from_tensor_model_parallel_region(squares)
        squares = copy_to_tensor_model_parallel_region(squares)
        normed = wide * torch.rsqrt(squares / self.size + self.eps)
        return (normed * self.weight.view(heads.shape[-2:])).to(heads.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The weight as a part of the whole, for checkpoints of any layout."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class Olmo2Attention(PackedSelfAttention):
    """Attention whose query and key are normed as a whole, before they are rotated.

    The norms are not called `q_layernorm` and `k_layernorm`: of those names Megatron sums gradients
    over ranks, which are whole here.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        size, groups = self.hidden_size_per_attention_head, config.num_query_groups
        self.query_norm = AllHeadsRMSNorm(config, config.num_attention_heads, size)
        self.key_norm = AllHeadsRMSNorm(config, groups or config.num_attention_heads, size)

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Query, key and value [T, 1, heads of this rank, D]."""
        heads: Any = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        query, key, value = heads
        return self.query_norm(query), self.key_norm(key), value


def get_olmo2_spec(
    args: argparse.Namespace, config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, for `--spec slime_plugins.models.olmo2 get_olmo2_spec`.

    Raises:
        ConfigError: a key head would have to be cut.
    """
    groups = config.num_query_groups or config.num_attention_heads
    if groups % config.tensor_model_parallel_size:
        raise ConfigError(
            f"--tensor-model-parallel-size {config.tensor_model_parallel_size} does not divide the "
            f"{groups} key heads of this OLMo 2, which it has to: keys are normed over all of them."
        )
    block = block_spec(config, LayerStyle(has_post_norms=True), vp_stage=vp_stage)
    for layer in block.layer_specs or ():
        parts: Any = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        parts.self_attention.module = Olmo2Attention
    return block
