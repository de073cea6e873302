"""What a transformer layer is made of, on packs, without TransformerEngine and Apex.

The names here are for layers of a model's own, as in `slime_plugins/models`.
"""

from slime.backends.megatron.layers.dense import (
    LastLayer,
    PackedRotary,
    PackedSelfAttention,
    PostNormLinear,
    RMSNorm,
    SwiGLUMLP,
    parameter_device,
)

__all__ = [
    "LastLayer",
    "PackedRotary",
    "PackedSelfAttention",
    "PostNormLinear",
    "RMSNorm",
    "SwiGLUMLP",
    "parameter_device",
]
