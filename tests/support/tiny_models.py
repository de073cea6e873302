"""Tiny random causal LMs in transformers' format, and a character tokenizer, for engine tests."""

from pathlib import Path
from typing import Any

import torch

# Ids of the tokenizer below; letters follow.
PAD, EOS, BOS = 0, 1, 2
_SPECIAL = ("<pad>", "<eos>", "<bos>")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:?!()"
VOCAB_SIZE = 64

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    # Larger than usual: logits must differ enough that a fault shows.
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GLM_MOE = {"n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# name -> (transformers config class, what differs from _BASE)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_tied": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 16}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "olmo2": ("Olmo2Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, "num_experts": 8, **_MOE}),
    "glm4_moe": ("Glm4MoeConfig", {"head_dim": 16, **_MOE, **_GLM_MOE}),
    "deepseek_v3": ("DeepseekV3Config", {**_MOE, **_MLA}),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "final_logit_softcapping": 0.5}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            **_MOE,
        },
    ),
}


def tiny_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model in eval mode; `changes` override its config."""
    import transformers

    class_name, own = ARCHITECTURES[name]
    config = getattr(transformers, class_name)(**{**_BASE, **own, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model.requires_grad_(False)


def char_tokenizer() -> Any:
    """One token per character, three special ones; no merges, so text and ids map one to one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*_SPECIAL, *_LETTERS])}
    vocab |= {f"<x{i}>": i for i in range(len(vocab), VOCAB_SIZE)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def save_tiny_model(folder: Path, name: str = "qwen3", *, seed: int = 0, **changes: Any) -> Path:
    """A folder with model and tokenizer."""
    tiny_model(name, seed=seed, **changes).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder
