"""Shapes of published models for benchmarks with random weights, and one for CPUs."""

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512,
             "max_position_embeddings": 4096, "torch_dtype": "float32"},
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "num_key_value_heads": 8},
    "qwen3-1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "num_key_value_heads": 8},
    "qwen3-4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "num_key_value_heads": 8},
    "glm4-9b": {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "hidden_size": 4096,
                "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32,
                "num_key_value_heads": 2, "vocab_size": 151552, "attention_bias": True,
                "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 10000,
                "partial_rotary_factor": 0.5},
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
                      "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
                      "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
                      "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                      "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
                      "router_aux_loss_coef": 0.0, "tie_word_embeddings": False},
    # As many tensors as qwen3-30b-a3b, 42 MB: for what a sync costs besides moving bytes.
    "many-experts": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
                     "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 48,
                     "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
                     "vocab_size": 512, "max_position_embeddings": 4096, "num_experts": 128,
                     "num_experts_per_tok": 8, "moe_intermediate_size": 16,
                     "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
                     "router_aux_loss_coef": 0.0, "tie_word_embeddings": False,
                     "torch_dtype": "float32"},
}  # fmt: skip
_COMMON: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def model_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """`config.json` of the shape, with fewer layers if asked for."""
    config = _COMMON | SHAPES[name]
    return config | ({"num_hidden_layers": layers} if layers else {})
