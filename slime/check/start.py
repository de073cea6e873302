"""check_start(): the weights a run begins with are there, and the round it begins at."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from slime.config.checkpoints import (
    RANK_FILES_REFUSED,
    TRACKER_FILE,
    has_megatron_checkpoint,
    has_rank_files,
    is_hf_folder,
)
from slime.config.config import Config
from slime.config.foreign import megatron_values
from slime.config.problems import Problems
from slime.data.data_source import state_path
from slime.errors import ConfigError

_RELEASE = "release"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StartFacts:
    """Where a run begins; `resumes` says whether optimizer and data go on where they stopped."""

    folder: Path | None
    resumes: bool
    first_round: int


def check_start(config: Config, problems: Problems, *, here: Problems) -> StartFacts:
    """Where the run begins; what is missing there is noted, files of weights in `here`."""
    view = problems.readable(config)
    with problems.caught():
        if view.debug_rollout_only:
            return StartFacts(None, False, view.start_rollout_id or 0)
    facts = StartFacts(None, False, 0)
    with problems.caught():
        if view.load is not None and has_megatron_checkpoint(view.load):
            facts = _checkpoint(view)
        elif view.load is not None and is_hf_folder(view.load):
            facts = StartFacts(Path(view.load), False, view.start_rollout_id or 0)
            with here.caught():
                check_weights(view.load)
    with problems.caught():
        needs_reference = view.ref_load is not None and view.ref_load != view.load
        if needs_reference and is_hf_folder(str(view.ref_load)):
            with here.caught():
                check_weights(str(view.ref_load))
    return facts


def _checkpoint(config: Config) -> StartFacts:
    """A checkpoint of Megatron's format, which must be whole.

    Raises:
        ConfigError: it is not, or its data state is missing.
    """
    root = Path(str(config.load))
    step = megatron_values(config.megatron_argv).get("ckpt_step")
    word = str(step) if step is not None else (root / TRACKER_FILE).read_text("utf-8").strip()
    if word != _RELEASE and not word.isdigit():
        raise ConfigError(
            f"--load: {root / TRACKER_FILE} holds {word!r}; it should be a number or {_RELEASE!r}"
        )
    folder = root / (_RELEASE if word == _RELEASE else f"iter_{int(word):07d}")
    if not (folder / "metadata.json").is_file():
        if has_rank_files(folder):
            raise ConfigError(f"--load: {folder} {RANK_FILES_REFUSED}")
        raise ConfigError(
            f"--load {root} should hold {folder.name}, but {folder} is missing or not whole; "
            f"restore it, or write the number of one that is whole into {root / TRACKER_FILE}"
        )
    resumes = word != _RELEASE and not config.finetune
    first = config.start_rollout_id
    if first is None:
        first = int(word) + 1 if resumes else 0
    if first > 0 and config.rollout_global_dataset:
        state = state_path(str(root), first - 1)
        if not state.is_file():
            raise ConfigError(
                f"--load: cannot continue the data after round {first - 1}: {state} is missing; "
                "load a checkpoint of slime that has it, or begin the data anew with "
                "--start-rollout-id 0"
            )
    return StartFacts(folder, resumes, first)


def check_weights(folder: str) -> None:
    """Nothing, when every file of weights that the folder should have is there.

    Raises:
        ConfigError: names those that are missing.
    """
    root = Path(folder)
    if not (root / _INDEX).is_file():
        if not any(root.glob("*.safetensors")):
            raise ConfigError(
                f"{folder} holds no weights (*.safetensors); download the whole model, or convert "
                "it to safetensors"
            )
        return
    try:
        index = cast(dict[str, Any], json.loads((root / _INDEX).read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {root / _INDEX}: {error}; copy it again") from error
    names = set(cast(dict[str, str], index.get("weight_map", {})).values())
    missing = sorted(name for name in names if not (root / name).is_file())
    if missing:
        raise ConfigError(
            f"{folder} lacks {len(missing)} of {len(names)} files of weights, such as "
            f"{missing[0]}; finish the download"
        )
