"""Where weights come from: what a folder holds, and which one a run starts from."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slime.config.checkpoints import RANK_FILES_REFUSED, TRACKER_FILE, has_rank_files
from slime.config.config import Config
from slime.errors import CheckpointError

logger = logging.getLogger(__name__)

_RELEASE = "release"


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    Attributes:
        kind: a Hugging Face folder, or one iteration of a Megatron checkpoint.
        path: the folder that holds the tensors.
        iteration: of a Megatron checkpoint; None for a "release", which has weights only.
    """

    kind: Literal["hf", "megatron"]
    path: Path
    iteration: int | None = None


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        source: of the weights.
        resumes: optimizer, scheduler and random state come from it too, and rollouts are counted
            on.
    """

    source: Source
    resumes: bool

    @property
    def first_rollout(self) -> int:
        """The one after the checkpoint's, or 0."""
        if not self.resumes or self.source.iteration is None:
            return 0
        return self.source.iteration + 1


def find_source(path: str, step: int | None = None) -> Source | None:
    """What a folder holds; None when it is neither kind of checkpoint.

    Args:
        step: iteration to take instead of the latest.

    Raises:
        CheckpointError: a Megatron checkpoint without the iteration it names.
    """
    folder = Path(path)
    if (folder / TRACKER_FILE).is_file():
        word = str(step) if step is not None else (folder / TRACKER_FILE).read_text().strip()
        iteration = None if word == _RELEASE else _iteration(word, folder)
        source = folder / (_RELEASE if iteration is None else f"iter_{iteration:07d}")
        if not (source / "metadata.json").is_file():
            if has_rank_files(source):
                raise CheckpointError(f"{source} {RANK_FILES_REFUSED}.")
            raise CheckpointError(
                f"{folder} should hold {source.name}, but {source} is missing or not whole; "
                f"restore it, or write the number of one that is whole into {folder / TRACKER_FILE}."
            )
        return Source("megatron", source, iteration)
    if (folder / "config.json").is_file():
        return Source("hf", folder)
    return None


def _iteration(word: str, folder: Path) -> int:
    if not word.isdigit():
        raise CheckpointError(
            f"{folder / TRACKER_FILE} holds {word!r}; it should be a number or {_RELEASE!r}."
        )
    return int(word)


def resolve_start(config: Config, *, load_step: int | None = None) -> Start:
    """--load if it holds a checkpoint, else --ref-load; --hf-checkpoint when neither is given.

    Raises:
        CheckpointError: a folder was given but nothing can be loaded: a run never starts from
        nothing.
    """
    if config.load is None and config.ref_load is None:
        return Start(_required(config.hf_checkpoint, "--hf-checkpoint"), resumes=False)
    if config.load is not None:
        source = find_source(config.load, load_step)
        if source is not None:
            has_state = source.kind == "megatron" and source.iteration is not None
            return Start(source, resumes=has_state and not config.finetune)
        if config.ref_load is None:
            raise CheckpointError(
                f"--load {config.load} holds neither {TRACKER_FILE} nor config.json, and there is "
                "no --ref-load to start from; check the path, or leave --load out to start from "
                "--hf-checkpoint."
            )
        logger.warning(
            "--load %s holds no checkpoint; starting at rollout 0 from --ref-load %s",
            config.load,
            config.ref_load,
        )
    return Start(_required(config.ref_load, "--ref-load", config.ref_ckpt_step), resumes=False)


def reference_source(config: Config) -> Source:
    """--ref-load, else --hf-checkpoint: the weights a first start had.

    Raises:
        CheckpointError: it holds no checkpoint.
    """
    if config.ref_load is not None:
        return _required(config.ref_load, "--ref-load", config.ref_ckpt_step)
    return _required(config.hf_checkpoint, "--hf-checkpoint")


def _required(path: str | None, flag: str, step: int | None = None) -> Source:
    source = None if path is None else find_source(path, step)
    if source is None:
        raise CheckpointError(
            f"{flag} {path} is neither a Hugging Face folder (config.json) nor a Megatron "
            f"checkpoint ({TRACKER_FILE}); check the path."
        )
    return source
