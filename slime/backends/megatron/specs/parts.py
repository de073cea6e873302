"""The modules that layers are made of: ours, or TransformerEngine's where they are asked for."""

import argparse
from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from slime.backends.megatron.layers.attention import VarlenAttention
from slime.backends.megatron.layers.dense import RMSNorm


@dataclass(frozen=True)
class Parts:
    """The modules that layers are made of; ours, unless --transformer-impl asks for others.

    Attributes:
        norm: RMSNorm.
        column, row: projections cut over tensor-parallel ranks by outputs, by inputs.
        core_attention: of a pack.
        norm_and_column: a norm and the projection after it as one; None = they stand apart.
    """

    norm: Any = RMSNorm
    column: Any = ColumnParallelLinear
    row: Any = RowParallelLinear
    core_attention: Any = VarlenAttention
    norm_and_column: Any = None


def chosen_parts(args: argparse.Namespace) -> Parts:
    """The parts that --transformer-impl asks for; TransformerEngine's, where it is installed."""
    if args.transformer_impl != "transformer_engine":
        return Parts()
    return _te_parts()


def _te_parts() -> Parts:
    """What Megatron's spec for it has: norms inside the projection that follows them, its linear layers.

    Heads are cut and turned by our kernel, and experts, latent attention and GLM-4's projections
    with a norm after them stay ours, which packs need.
    """
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    from slime.backends.megatron.layers.te_attention import PackedTEAttention

    column: Any = TEColumnParallelLinear
    row: Any = TERowParallelLinear
    return Parts(
        norm=TENorm,
        column=column,
        row=row,
        core_attention=PackedTEAttention,
        norm_and_column=TELayerNormColumnParallelLinear,
    )
