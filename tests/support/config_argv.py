"""A smallest command line that resolves: a model folder with config.json alone, one prompt file."""

import json
from pathlib import Path

HF_CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1000000.0},
    "tie_word_embeddings": True,
}


def write_model_folder(folder: Path) -> Path:
    """`folder` with the config.json of a tiny Qwen3; there are no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    return folder


def write_prompts(path: Path) -> Path:
    """One row."""
    path.write_text('{"input": "1 + 1 =", "label": "2"}\n')
    return path


def base_argv(folder: Path, **changes: str | None) -> list[str]:
    """32 samples a round on two ranks and two engines.

    Args:
        folder: a temporary one, filled here.
        changes: flag in dest form -> another value; None leaves the flag out; "" is a switch.
    """
    flags: dict[str, str | None] = {
        "hf_checkpoint": str(write_model_folder(folder / "model")),
        "prompt_data": str(write_prompts(folder / "prompts.jsonl")),
        "num_layers": "2",
        "num_rollout": "3",
        "rollout_batch_size": "4",
        "n_samples_per_prompt": "8",
        "actor_num_gpus_per_node": "2",
        "rollout_num_gpus": "2",
        "rm_type": "exact_match",
    }
    argv: list[str] = []
    for name, value in (flags | changes).items():
        if value is not None:
            argv.append("--" + name.replace("_", "-"))
            argv.extend([value] if value else [])
    return argv
