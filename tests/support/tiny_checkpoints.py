"""Random small Hugging Face folders, written in milliseconds without transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from slime.checkpoint.mapping import ModelDims, load_mapping

_CLASSES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


def tiny_config(
    model_type: str = "qwen3",
    *,
    vocab_size: int = 106,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    tied: bool = True,
) -> dict[str, Any]:
    """The `config.json` of a small model, in the form the published ones have."""
    config: dict[str, Any] = {
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if model_type != "qwen2":
        config["attention_bias"] = False
    return config


def random_weights(config: dict[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """fp32 tensors under the names on disk.

    Matrices are normal with 1/sqrt(fan-in), so that logits spread; norms and biases differ from 1
    and 0, so that a test notices when one of them lands in the wrong place.
    """
    mapping = load_mapping(config["model_type"])
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in mapping.hf_parameters(ModelDims.from_hf_config(config)).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            weights[name] = noise * shape[1] ** -0.5
        else:
            weights[name] = 0.1 * noise + (0.0 if name.endswith(".bias") else 1.0)
    return weights


def make_tiny_model(path: Path | str, config: dict[str, Any], *, seed: int = 0) -> str:
    """Write a random model of `config` to the folder `path`; returns `path`."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(random_weights(config, seed=seed), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def make_tiny_qwen3(
    path: Path | str,
    *,
    vocab_size: int,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    seed: int = 0,
    tied: bool = True,
) -> str:
    """Write a random Qwen3 (about 0.1 M parameters) to the folder `path`; returns `path`."""
    config = tiny_config(
        vocab_size=vocab_size,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        tied=tied,
    )
    return make_tiny_model(path, config, seed=seed)
