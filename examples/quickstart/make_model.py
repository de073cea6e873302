"""A random Qwen3 of 0.22 M parameters with a character tokenizer, as a Hugging Face folder.

Needs neither torch nor transformers. For a GPU (`--size gpu`) it has 0.40 M: attention kernels there
want heads of 64 numbers or more.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

# The first three are left out of decoded text where one asks for that.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
NUM_SKIPPED = 3
ROLES = ["system", "user", "assistant"]
CHARACTERS = "\n 0123456789+-*/=(),:.?!abcdefghijklmnopqrstuvwxyz"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INIT_STD = 0.02


@dataclass(frozen=True)
class Size:
    """A shape; `positions` is the longest conversation in tokens."""

    hidden: int
    heads: int
    head_dim: int
    layers: int = 2
    kv_heads: int = 1
    positions: int = 256

    @property
    def intermediate(self) -> int:
        """Width of the MLP."""
        return 3 * self.hidden


SIZES = {"cpu": Size(96, 3, 32), "gpu": Size(128, 2, 64)}


def write_tokenizer(
    folder: Path,
    words: Sequence[str] = (*SPECIAL, *ROLES),
    characters: str = CHARACTERS,
    chat_template: str = CHAT_TEMPLATE,
    positions: int = 256,
) -> int:
    """tokenizer.json and tokenizer_config.json; the size of the vocabulary.

    Args:
        words: are one token each, in the order of their ids; `SPECIAL` come first.
        characters: are one token each, too.
    """
    vocabulary = [*words, *characters]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in words[:NUM_SKIPPED]]
    )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words[NUM_SKIPPED:]])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return len(vocabulary)


def write_config(folder: Path, vocab_size: int, size: Size) -> None:
    """config.json and generation_config.json."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": size.positions,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": INIT_STD,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "pad_token_id": 0})
    )


def write_weights(folder: Path, vocab_size: int, size: Size, seed: int) -> None:
    """model.safetensors with normal(0, 0.02) matrices and norms of one, fp32."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.normal(0, INIT_STD, shape).astype(np.float32)
        for name, shape in parameter_shapes(vocab_size, size).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def parameter_shapes(vocab_size: int, size: Size) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter; the output layer is tied to the embedding."""
    hidden, wide = size.hidden, size.intermediate
    query, key = size.heads * size.head_dim, size.kv_heads * size.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(size.layers):
        layer = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (query, hidden),
            "self_attn.k_proj.weight": (key, hidden),
            "self_attn.v_proj.weight": (key, hidden),
            "self_attn.o_proj.weight": (hidden, query),
            "self_attn.q_norm.weight": (size.head_dim,),
            "self_attn.k_norm.weight": (size.head_dim,),
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def write_model(folder: Path, seed: int, size: Size = SIZES["cpu"], **tokenizer: Any) -> None:
    """The whole folder; `tokenizer` as in `write_tokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(folder, positions=size.positions, **tokenizer)
    write_config(folder, vocab_size, size)
    write_weights(folder, vocab_size, size, seed)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--positions", type=int, default=256, help="longest conversation in tokens")
    options = parser.parse_args()
    size = replace(SIZES[options.size], positions=options.positions)
    write_model(options.folder, options.seed, size)


if __name__ == "__main__":
    main()
