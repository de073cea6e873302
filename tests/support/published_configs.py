"""The sizes in the `config.json` of published models, under the keys that they have there."""

from typing import Any

_USUAL: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}

QWEN3_30B_A3B: dict[str, Any] = _USUAL | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "use_sliding_window": False,
}

GLM4_9B: dict[str, Any] = _USUAL | {
    "model_type": "glm4",
    "num_hidden_layers": 40,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 151552,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}

GLM45_355B: dict[str, Any] = _USUAL | {
    "model_type": "glm4_moe",
    "num_hidden_layers": 92,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151552,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "use_qk_norm": True,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "first_k_dense_replace": 3,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}

GLM45_AIR: dict[str, Any] = GLM45_355B | {
    "num_hidden_layers": 46,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "use_qk_norm": False,
    "n_routed_experts": 128,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
}

DEEPSEEK_R1: dict[str, Any] = _USUAL | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}

MOONLIGHT: dict[str, Any] = DEEPSEEK_R1 | {
    "num_hidden_layers": 27,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 163840,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "rope_scaling": None,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "num_nextn_predict_layers": 0,
}

_QWEN3_DENSE: dict[str, Any] = _USUAL | {
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
QWEN3_06B: dict[str, Any] = _QWEN3_DENSE | {
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
}
QWEN3_17B: dict[str, Any] = QWEN3_06B | {"hidden_size": 2048, "intermediate_size": 6144}
QWEN3_4B: dict[str, Any] = _QWEN3_DENSE | {
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
}
QWEN3_8B: dict[str, Any] = QWEN3_4B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}

QWEN25_05B: dict[str, Any] = _USUAL | {
    "model_type": "qwen2",
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
del QWEN25_05B["attention_bias"]  # Qwen2 has biases, and no key that says so
QWEN25_7B: dict[str, Any] = QWEN25_05B | {
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}

OLMO2_1B: dict[str, Any] = _USUAL | {
    "model_type": "olmo2",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 100352,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000,
}

LLAMA31_8B: dict[str, Any] = _USUAL | {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
SMOLLM2_135M: dict[str, Any] = _USUAL | {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}

# Name of the file in scripts/models -> its model.
MODEL_SCRIPTS: dict[str, dict[str, Any]] = {
    "deepseek-v3": DEEPSEEK_R1,
    "glm4-9B": GLM4_9B,
    "glm4.5-106B-A12B": GLM45_AIR,
    "glm4.5-355B-A32B": GLM45_355B,
    "llama3.1-8B": LLAMA31_8B,
    "moonlight": MOONLIGHT,
    "olmo2-1B": OLMO2_1B,
    "qwen2.5-0.5B": QWEN25_05B,
    "qwen2.5-7B": QWEN25_7B,
    "qwen3-0.6B": QWEN3_06B,
    "qwen3-1.7B": QWEN3_17B,
    "qwen3-30B-A3B": QWEN3_30B_A3B,
    "qwen3-4B": QWEN3_4B,
    "qwen3-8B": QWEN3_8B,
    "smollm2-135M": SMOLLM2_135M,
}
