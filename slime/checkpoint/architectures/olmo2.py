"""OLMo 2 (`model_type` olmo2): norms after attention and MLP, and over all query and all key heads."""

from slime.checkpoint.architectures.rows import DENSE_MLP, TOP
from slime.checkpoint.mapping import FusedQKV, Mapping, Rename

OLMO2 = Mapping(
    top=TOP,
    layer=[
        FusedQKV("self_attention.linear_qkv.weight", "self_attn.{q,k,v}_proj.weight"),
        # One weight for each number of a whole query or key: cut with the heads.
        Rename(
            "self_attention.query_norm.weight",
            "self_attn.q_norm.weight",
            shape=("query_size",),
            sharding="column",
        ),
        Rename(
            "self_attention.key_norm.weight",
            "self_attn.k_norm.weight",
            shape=("key_value_size",),
            sharding="column",
        ),
        Rename(
            "self_attention.linear_proj.weight",
            "self_attn.o_proj.weight",
            shape=("hidden", "query_size"),
            sharding="row",
        ),
        Rename(
            "self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm.weight"
        ),
        *DENSE_MLP,
        Rename("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm.weight"),
    ],
)
