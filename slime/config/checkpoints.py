"""What a folder holds, told by its files alone: a Megatron checkpoint, or a Hugging Face model."""

import json
from pathlib import Path
from typing import Any, cast

from slime.errors import ConfigError

TRACKER_FILE = "latest_checkpointed_iteration.txt"


def has_megatron_checkpoint(folder: str) -> bool:
    """Whether a checkpoint in Megatron's format was written there completely."""
    return (Path(folder) / TRACKER_FILE).is_file()


def is_hf_folder(folder: str) -> bool:
    """Whether it is a model folder in Hugging Face format."""
    return (Path(folder) / "config.json").is_file()


def read_hf_config(folder: str) -> dict[str, Any]:
    """The text model's part of `config.json`.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = Path(folder) / "config.json"
    try:
        content = cast(dict[str, Any], json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return cast(dict[str, Any], content.get("text_config", content))
