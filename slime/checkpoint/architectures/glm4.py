"""GLM-4, dense (`model_type` glm4), as GLM-4-9B-0414 and GLM-4-32B-0414.

Attention and MLP each have a second norm, on what they add to the residual; Megatron's parameters
of that norm belong to the linear layer before it. On disk gate and up are one tensor.
"""

from slime.checkpoint.architectures.rows import ATTENTION, NORMS, TOP
from slime.checkpoint.mapping import Mapping, Rename

GLM4 = Mapping(
    top=TOP,
    layer=[
        *NORMS,
        *ATTENTION,
        Rename(
            "self_attention.linear_proj.post_layernorm.weight", "post_self_attn_layernorm.weight"
        ),
        Rename(
            "mlp.linear_fc1.weight",
            "mlp.gate_up_proj.weight",
            shape=("gate_up", "hidden"),
            sharding="gate_up",
        ),
        Rename(
            "mlp.linear_fc2.weight", "mlp.down_proj.weight", shape=("hidden", "ffn"), sharding="row"
        ),
        Rename("mlp.linear_fc2.post_layernorm.weight", "post_mlp_layernorm.weight"),
    ],
)
