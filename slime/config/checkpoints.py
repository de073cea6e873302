"""What a folder holds, told by its files alone: a Megatron checkpoint, or a Hugging Face model."""

import json
import re
from pathlib import Path
from typing import Any, cast

from slime.errors import ConfigError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
# A checkpoint grows in a folder with this ending and is renamed when it is whole.
HALF_WRITTEN = ".partial"
# Megatron's --ckpt-format torch: a folder for each tensor, pipeline and expert rank.
RANK_FOLDER = re.compile(r"mp_rank_\d{2,}(_\d{3,}){0,2}")
# What a run says of such a checkpoint, after its name.
RANK_FILES_REFUSED = (
    "is a checkpoint of --ckpt-format torch, which the trainer does not read; tools/convert_to_hf.py "
    "makes a Hugging Face folder of its weights, which --load takes"
)


def has_megatron_checkpoint(folder: str) -> bool:
    """Whether a checkpoint in Megatron's format was written there completely."""
    return (Path(folder) / TRACKER_FILE).is_file()


def has_rank_files(folder: Path) -> bool:
    """Whether it is one iteration of a checkpoint of Megatron's --ckpt-format torch."""
    inner = folder.iterdir() if folder.is_dir() else iter(())
    return any(RANK_FOLDER.fullmatch(item.name) for item in inner)


def saved_so_far(folder: str) -> list[str]:
    """Names of the checkpoints in a folder, whole or half-written (`.partial`), oldest first."""
    return sorted(path.name for path in Path(folder).glob("iter_*") if path.is_dir())


def is_hf_folder(folder: str) -> bool:
    """Whether it is a model folder in Hugging Face format."""
    return (Path(folder) / "config.json").is_file()


def read_hf_config(folder: str) -> dict[str, Any]:
    """The text model's part of `config.json`.

    Raises:
        ConfigError: the file cannot be read.
    """
    content = read_whole_hf_config(folder)
    return cast(dict[str, Any], content.get("text_config", content))


def read_whole_hf_config(folder: str) -> dict[str, Any]:
    """`config.json`.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = Path(folder) / "config.json"
    try:
        return cast(dict[str, Any], json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
