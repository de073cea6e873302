"""Qwen3 with experts (`model_type` qwen3_moe): Qwen3's attention, no shared experts.

All layers have experts unless the config's `mlp_only_layers` or `decoder_sparse_step` say no.
"""

from slime.checkpoint.architectures.rows import (
    ATTENTION,
    DENSE_MLP,
    NORMS,
    ROUTED_EXPERTS,
    TOP,
)
from slime.checkpoint.mapping import Mapping

QWEN3_MOE = Mapping(
    top=TOP,
    layer=[*NORMS, *ATTENTION],
    dense=DENSE_MLP,
    moe=ROUTED_EXPERTS,
)
