"""DeepSeek-V3, R1 and Moonlight (`model_type` deepseek_v3): multi-latent attention and experts.

The down projections and their norms are whole on every tensor-parallel rank; the up projections are
cut by heads. Queries go through a low rank, or directly when `q_lora_rank` is null.
The layer for multi-token prediction that the published folders hold after the others is passed over
when reading and not written: it is not trained.
"""

from slime.checkpoint.architectures.rows import (
    DENSE_MLP,
    MTP_NAMES,
    NORMS,
    ROUTED_EXPERTS,
    ROUTER_BIAS,
    SHARED_EXPERTS,
    TOP,
)
from slime.checkpoint.entries import Entry
from slime.checkpoint.mapping import Mapping, Rename

_QUERY: list[Entry] = [
    Rename(
        "self_attention.linear_q_proj.weight",
        "self_attn.q_proj.weight",
        shape=("mla_query_size", "hidden"),
        sharding="column",
        only_if="no_q_lora",
    ),
    Rename(
        "self_attention.linear_q_down_proj.weight",
        "self_attn.q_a_proj.weight",
        shape=("q_lora_rank", "hidden"),
        only_if="q_lora",
    ),
    Rename(
        "self_attention.q_layernorm.weight",
        "self_attn.q_a_layernorm.weight",
        shape=("q_lora_rank",),
        only_if="q_lora",
    ),
    Rename(
        "self_attention.linear_q_up_proj.weight",
        "self_attn.q_b_proj.weight",
        shape=("mla_query_size", "q_lora_rank"),
        sharding="column",
        only_if="q_lora",
    ),
]

_KEY_VALUE: list[Entry] = [
    Rename(
        "self_attention.linear_kv_down_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        shape=("mla_kv_down_size", "hidden"),
    ),
    Rename(
        "self_attention.kv_layernorm.weight",
        "self_attn.kv_a_layernorm.weight",
        shape=("kv_lora_rank",),
    ),
    Rename(
        "self_attention.linear_kv_up_proj.weight",
        "self_attn.kv_b_proj.weight",
        shape=("mla_kv_up_size", "kv_lora_rank"),
        sharding="column",
    ),
]

_OUTPUT = Rename(
    "self_attention.linear_proj.weight",
    "self_attn.o_proj.weight",
    shape=("hidden", "mla_output_size"),
    sharding="row",
)

DEEPSEEK_V3 = Mapping(
    top=TOP,
    layer=[*NORMS, *_QUERY, *_KEY_VALUE, _OUTPUT],
    dense=DENSE_MLP,
    moe=[*ROUTED_EXPERTS, *ROUTER_BIAS, *SHARED_EXPERTS],
    mtp_hf=MTP_NAMES,
)
