"""Qwen2 and Qwen2.5 (`model_type` qwen2): Llama with a bias on query, key and value."""

from slime.checkpoint.architectures.llama import LLAMA
from slime.checkpoint.mapping import FusedQKV, Mapping

QWEN2 = Mapping(
    top=LLAMA.top,
    layer=[
        *LLAMA.layer,
        FusedQKV("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias"),
    ],
)
