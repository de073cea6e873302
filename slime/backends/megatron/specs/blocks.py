"""Layer specs: which modules make a layer of each family, and which layers a pipeline stage has.

The parameters' names and shapes are those of Megatron's own local spec, so checkpoints of stock
Megatron load; experts and second norms, which it lacks or has otherwise, have names of their own.
Layers that differ otherwise are in `slime_plugins/models`, and start from `block_spec` too.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from slime.backends.megatron.layers.attention import VarlenAttention
from slime.backends.megatron.layers.dense import (
    LastLayer,
    PackedSelfAttention,
    PostNormLinear,
    RMSNorm,
    SwiGLUMLP,
)
from slime.backends.megatron.layers.dispatch import PackedMoE
from slime.backends.megatron.layers.experts import GroupedExperts, Router, SharedExperts
from slime.backends.megatron.layers.mla import PackedMLA, mla_submodules
from slime.backends.megatron.specs.parts import Parts
from slime.checkpoint.saved_names import (
    FUSED_MLA_NORMS,
    FUSED_MLP_NORM,
    FUSED_QKV_NORM,
    POST_NORMS,
)


@dataclass(frozen=True)
class LayerStyle:
    """What distinguishes layers and no flag of Megatron says.

    Attributes:
        has_post_norms: attention and MLP end in an RMSNorm of their own, before the residual.
    """

    has_post_norms: bool = False


def block_spec(
    config: TransformerConfig,
    style: LayerStyle | None = None,
    *,
    vp_stage: int | None = None,
    parts: Parts | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, and the final norm.

    Each layer has a spec of its own, which a caller may change before it is built.
    """
    style, parts = style or LayerStyle(), parts or Parts()
    first = get_transformer_layer_offset(config, vp_stage)
    stop = first + get_num_layers_to_build(config, vp_stage)
    has_experts = _layers_with_experts(config)
    return TransformerBlockSubmodules(
        layer_specs=[
            _layer_spec(
                config,
                style,
                parts,
                has_experts=has_experts[i],
                is_last=i + 1 == config.num_layers,
            )
            for i in range(first, stop)
        ],
        layer_norm=parts.norm,
    )


def _layers_with_experts(config: TransformerConfig) -> list[bool]:
    """For each layer of the whole model: experts instead of one MLP."""
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    if isinstance(frequency, int):
        return [i % frequency == 0 for i in range(config.num_layers)]
    assert len(frequency) == config.num_layers, "checked with the arguments"
    return [bool(one) for one in frequency]


def _layer_spec(
    config: TransformerConfig,
    style: LayerStyle,
    parts: Parts,
    *,
    has_experts: bool,
    is_last: bool,
) -> ModuleSpec:
    """One layer: RMSNorm, attention, RMSNorm, MLP or experts, each half with its residual."""
    output: Any = PostNormLinear if style.has_post_norms else parts.row
    residual: Any = get_bias_dropout_add
    is_mla = config.multi_latent_attention
    is_fused = parts.norm_and_column is not None
    names: dict[str, str] = {}
    if is_mla:
        names |= FUSED_MLA_NORMS
    elif not is_fused:
        names |= FUSED_QKV_NORM
    if not (has_experts or is_fused):
        names |= FUSED_MLP_NORM
    if style.has_post_norms:
        names |= POST_NORMS
    return ModuleSpec(
        module=LastLayer if is_last else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if is_fused and not is_mla else parts.norm,
            self_attention=_latent_attention(config, output)
            if is_mla
            else _attention(config, parts, output),
            self_attn_bda=residual,
            pre_mlp_layernorm=IdentityOp if is_fused and not has_experts else parts.norm,
            mlp=_experts() if has_experts else _mlp(config, parts, output),
            mlp_bda=residual,
            sharded_state_dict_keys_map=names,
        ),
    )


def _attention(config: TransformerConfig, parts: Parts, output: Any) -> ModuleSpec:
    norm = RMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.norm_and_column or parts.column,
            core_attention=parts.core_attention,
            linear_proj=output,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def _latent_attention(config: TransformerConfig, output: Any) -> ModuleSpec:
    submodules = mla_submodules(
        cast(MLATransformerConfig, config),
        norm=RMSNorm,
        core_attention=VarlenAttention,
        linear_proj=output,
    )
    return ModuleSpec(
        module=PackedMLA, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules
    )


def _mlp(config: TransformerConfig, parts: Parts, output: Any) -> Any:
    is_swiglu = config.gated_linear_unit and config.activation_func == F.silu
    module = SwiGLUMLP if is_swiglu else MLP
    return partial(
        module.as_mlp_submodule,
        submodules=MLPSubmodules(
            linear_fc1=parts.norm_and_column or parts.column, linear_fc2=output
        ),
    )


def _experts() -> Any:
    shared = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return partial(
        PackedMoE,
        submodules=MoESubmodules(
            experts=GroupedExperts,
            shared_experts=partial(SharedExperts, submodules=shared),
            router=Router,
        ),
    )
