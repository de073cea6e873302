"""Groups of rows that the tables of several families are made of."""

from slime.checkpoint.entries import Entry, FusedQKV, GateUp, Rename, TiedOr, expert_stack

TOP: list[Entry] = [
    Rename("embedding.word_embeddings.weight", "model.embed_tokens.weight", padded_vocab=True),
    Rename("decoder.final_layernorm.weight", "model.norm.weight"),
    TiedOr("output_layer.weight", "lm_head.weight", padded_vocab=True),
]

NORMS: list[Entry] = [
    Rename("input_layernorm.weight", "input_layernorm.weight"),
    Rename("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
]

# Attention with grouped queries.
ATTENTION: list[Entry] = [
    FusedQKV("self_attention.linear_qkv.weight", "self_attn.{q,k,v}_proj.weight"),
    FusedQKV("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias", only_if="qkv_bias"),
    Rename(
        "self_attention.q_layernorm.weight",
        "self_attn.q_norm.weight",
        shape=("head_dim",),
        only_if="qk_norm",
    ),
    Rename(
        "self_attention.k_layernorm.weight",
        "self_attn.k_norm.weight",
        shape=("head_dim",),
        only_if="qk_norm",
    ),
    Rename(
        "self_attention.linear_proj.weight",
        "self_attn.o_proj.weight",
        shape=("hidden", "query_size"),
        sharding="row",
    ),
]

DENSE_MLP: list[Entry] = [
    GateUp("mlp.linear_fc1.weight", "mlp.{gate,up}_proj.weight"),
    Rename(
        "mlp.linear_fc2.weight", "mlp.down_proj.weight", shape=("hidden", "ffn"), sharding="row"
    ),
]

ROUTED_EXPERTS: list[Entry] = [
    Rename("mlp.router.weight", "mlp.gate.weight", shape=("num_experts", "hidden")),
    expert_stack(
        GateUp("mlp.experts.weight1", "mlp.experts.{e}.{gate,up}_proj.weight", ffn="moe_ffn")
    ),
    expert_stack(
        Rename(
            "mlp.experts.weight2",
            "mlp.experts.{e}.down_proj.weight",
            shape=("hidden", "moe_ffn"),
            sharding="row",
        )
    ),
]

# What choosing experts without an auxiliary loss adds: to the scores, only for the choice.
ROUTER_BIAS: list[Entry] = [
    Rename(
        "mlp.router.expert_bias",
        "mlp.gate.e_score_correction_bias",
        shape=("num_experts",),
        is_buffer=True,
    ),
]

SHARED_EXPERTS: list[Entry] = [
    GateUp(
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_experts.{gate,up}_proj.weight",
        ffn="shared_ffn",
        only_if="shared_experts",
    ),
    Rename(
        "mlp.shared_experts.linear_fc2.weight",
        "mlp.shared_experts.down_proj.weight",
        shape=("hidden", "shared_ffn"),
        sharding="row",
        only_if="shared_experts",
    ),
]

# Of a layer for multi-token prediction, besides what an ordinary layer has.
MTP_NAMES = (
    "embed_tokens.weight",
    "enorm.weight",
    "hnorm.weight",
    "eh_proj.weight",
    "shared_head.norm.weight",
    "shared_head.head.weight",
)
