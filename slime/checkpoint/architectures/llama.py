"""Llama 2, 3 and models of its form such as SmolLM2 (`model_type` llama): no bias, no q/k norm."""

from slime.checkpoint.mapping import FusedQKV, GateUp, Mapping, Rename, TiedOr

LLAMA = Mapping(
    top=[
        Rename("embedding.word_embeddings.weight", "model.embed_tokens.weight", padded_vocab=True),
        Rename("decoder.final_layernorm.weight", "model.norm.weight"),
        TiedOr("output_layer.weight", "lm_head.weight", padded_vocab=True),
    ],
    layer=[
        Rename("input_layernorm.weight", "input_layernorm.weight"),
        FusedQKV("self_attention.linear_qkv.weight", "self_attn.{q,k,v}_proj.weight"),
        Rename(
            "self_attention.linear_proj.weight",
            "self_attn.o_proj.weight",
            shape=("hidden", "query_size"),
            sharding="row",
        ),
        Rename("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        GateUp("mlp.linear_fc1.weight", "mlp.{gate,up}_proj.weight"),
        Rename(
            "mlp.linear_fc2.weight",
            "mlp.down_proj.weight",
            shape=("hidden", "ffn"),
            sharding="row",
        ),
    ],
)
