"""A random small Hugging Face folder of each family, written without transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from slime.checkpoint.mapping import ModelDims, load_mapping

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    # transformers makes a padding row of the embedding otherwise, whose gradient it drops.
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
    "use_cache": True,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GLM_EXPERTS: dict[str, Any] = _EXPERTS | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}

# model_type -> the class transformers builds, and what differs from _COMMON.
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "glm4": (
        "Glm4ForCausalLM",
        {"attention_bias": True, "partial_rotary_factor": 0.5},
    ),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        _EXPERTS
        | {
            "num_experts": 4,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.0,
        },
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        _GLM_EXPERTS
        | {
            "attention_bias": True,
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        _GLM_EXPERTS
        | {
            "num_key_value_heads": 4,
            "n_group": 2,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)


def tiny_family_config(model_type: str, *, vocab_size: int, **changes: Any) -> dict[str, Any]:
    """The `config.json` of a small model, in the form the published ones have.

    Args:
        changes: keys that differ.
    """
    class_name, own = _FAMILIES[model_type]
    config = _COMMON | own | {"model_type": model_type, "vocab_size": vocab_size}
    if model_type == "deepseek_v3":
        del config["head_dim"]  # transformers gives the name to the part with RoPE
    return config | {"architectures": [class_name]} | changes


def tiny_family_weights(config: dict[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """fp32 tensors under the names on disk, those that the mapping says.

    Matrices are normal with 1/sqrt(fan-in), so that logits spread; norms differ from 1, biases
    from 0 and the experts' biases from each other, so that a test notices when one of them lands in
    the wrong place.
    """
    mapping, dims = load_mapping(config["model_type"]), ModelDims.from_hf_config(config)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in mapping.hf_parameters(dims).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            weights[name] = noise * shape[1] ** -0.5
        else:
            weights[name] = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
    return weights


def make_tiny_family(
    folder: Path | str, model_type: str, *, vocab_size: int, seed: int = 0, **changes: Any
) -> str:
    """Write a random model (about 0.2 M parameters) of 4 layers to `folder`; returns `folder`.

    With experts: 4, of which each token gets 2. GLM-4.5 and DeepSeek-V3 have a dense first layer
    and a shared expert, DeepSeek-V3 two groups of experts, of which each token gets one.

    Args:
        model_type: one of FAMILIES.
        changes: keys of `config.json` that differ.
    """
    config = tiny_family_config(model_type, vocab_size=vocab_size, **changes)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    weights = tiny_family_weights(config, seed=seed)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return str(folder)
