"""What the benchmarks of whole rollouts and steps share: a random model, prompts, response lengths.

Answers of random weights have no natural end: each sample gets its own length, drawn from a seed,
and runs to it with `ignore_eos`. Lengths are log-normal with a median of a quarter of the longest,
as answers of reasoning models are: many short ones, a long tail.
"""

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, model_config

from slime.checkpoint.dims import ModelDims
from slime.checkpoint.mapping import load_mapping
from slime.data.sample import Sample
from slime.rollout.sglang_rollout import generate as one_turn

_SPECIAL = ("<pad>", "<eos>")
_SHARD_BYTES = 2 * 2**30
_SHORTEST = 4
PACKAGES = ("torch", "sglang", "ray", "megatron-core", "transformers", "smg", "flash-attn-4")


def make_model(folder: Path, shape: str, tokenizer: str | None) -> None:
    """As `write_model`, in a process of its own, which gives back what it takes of the card."""
    words = [str(folder), shape, *(["--tokenizer", tokenizer] if tokenizer else [])]
    subprocess.run([sys.executable, __file__, *words], check=True)


def write_model(folder: Path, shape: str, *, tokenizer: Path | None = None, seed: int = 0) -> None:
    """A folder with random weights (normal, 0.02; norms 1) and a tokenizer; nothing if it is there.

    Args:
        tokenizer: a folder with `tokenizer.json` and `tokenizer_config.json`; without one every id
            is a word, `w17`.
    """
    if (folder / "whole").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = model_config(shape)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if tokenizer is None:
        _write_tokenizer(folder, config["vocab_size"])
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, folder / name)
    _write_weights(folder, config, seed)
    (folder / "whole").touch()


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    words = [*_SPECIAL, *(f"w{i}" for i in range(len(_SPECIAL), vocab_size))]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": word, "special": True, **special}
            for i, word in enumerate(_SPECIAL)
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": _SPECIAL[0],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": _SPECIAL[0],
        "eos_token": _SPECIAL[1],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_weights(folder: Path, config: Mapping[str, Any], seed: int) -> None:
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, config["torch_dtype"])
    shards: list[dict[str, torch.Tensor]] = [{}]
    sizes = [0]
    for name, shape in _shapes(config):
        tensor = torch.ones(shape, dtype=dtype)
        if len(shape) > 1:
            noise = torch.empty(shape, device=device, dtype=dtype)
            tensor = noise.normal_(0.0, 0.02, generator=generator).cpu()
        if sizes[-1] + tensor.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += tensor.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    layer = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden), "self_attn.o_proj": (hidden, query),
        "self_attn.q_norm": (size,), "self_attn.k_norm": (size,), "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            yield f"model.layers.{i}.{name}.weight", shape


# --- prompts, and how long their answers are ---


def response_lengths(
    count: int, longest: int, seed: int, *, median: float = 0.25, sigma: float = 0.7
) -> list[int]:
    """Log-normal, with its median as a share of the longest, none longer than that; tokens."""
    noise = np.random.default_rng(seed).standard_normal(count)
    return [response_length(value, longest, median=median, sigma=sigma) for value in noise]


def response_length(noise: float, longest: int, *, median: float, sigma: float) -> int:
    """That of one answer, from a standard normal value."""
    return int(np.clip(longest * median * np.exp(sigma * noise), _SHORTEST, longest))


def write_prompts(
    path: Path, model: Path, *, lengths: Sequence[int], per_prompt: int, tokens: int, seed: int
) -> None:
    """Rows `{"prompt", "metadata": {"lengths": [per_prompt]}}` of prompts of about `tokens` ids."""
    from slime.data.chat import load_tokenizer, token_ids

    rng = np.random.default_rng(seed)
    tokenizer, vocab = load_tokenizer(str(model)), 500

    def text(words: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(2, vocab, words))

    per_word = len(token_ids(tokenizer, text(1000))) / 1000
    with path.open("w") as file:
        for i in range(0, len(lengths), per_prompt):
            row = {
                "prompt": text(max(1, round(tokens / per_word))),
                "metadata": {"lengths": list(lengths[i : i + per_prompt])},
            }
            file.write(json.dumps(row) + "\n")


async def generate(args: Any, sample: Sample, sampling_params: Mapping[str, Any]) -> Sample:
    """For --custom-generate-function-path: one turn of exactly the sample's length."""
    lengths = sample.metadata["lengths"]
    length = lengths[(sample.index or 0) % len(lengths)]
    return await one_turn(
        args, sample, {**sampling_params, "max_new_tokens": length, "ignore_eos": True}
    )


async def reward(args: Any, sample: Sample) -> float:
    """For --custom-rm-path: next to nothing, and different within a group."""
    return float(sample.tokens[-1] % 2)


# --- where it ran ---


def host() -> dict[str, Any]:
    """Cards and versions, for the JSON."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cards": [name for name, _ in cards()], "versions": versions}


def cards() -> list[tuple[str, float]]:
    """Name and memory in GiB of every card; none without a driver. No CUDA context is made."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    rows = (line.rsplit(",", 1) for line in lines.splitlines() if line.strip())
    return [(name.strip(), float(mib) / 1024) for name, mib in rows]


def count_parameters(shape: str) -> int:
    """Numbers in a checkpoint of this shape."""
    config = model_config(shape)
    return load_mapping(config["model_type"]).count_numbers(ModelDims.from_hf_config(config))


def main() -> None:
    """Write a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
    write_model(options.folder, options.shape, tokenizer=options.tokenizer)


if __name__ == "__main__":
    main()
