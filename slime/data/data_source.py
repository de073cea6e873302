"""DataSource: groups of fresh samples for each round; unfinished ones wait in a buffer."""

import logging
from collections.abc import Callable, Iterable, Iterator
from copy import copy, deepcopy
from dataclasses import is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, cast

from slime.data.chat import load_tokenizer
from slime.data.dataset import Dataset, DatasetSpec
from slime.data.sample import Sample
from slime.data.state import decode, encode, read_json, write_json
from slime.errors import CheckpointError, ConfigError, DataError, SlimeError
from slime.plugins import load_function

logger = logging.getLogger(__name__)

_ATOMS = (str, bytes, int, float, bool, NoneType, Enum)

Group = list[Sample]
BufferFilter = Callable[[Any, int | None, list[Group], int], list[Group]]
STATE_VERSION = 1


class DataSource(Protocol):
    """What a rollout function asks for samples; `--data-source-path` names a class of this kind.

    It is made as `DataSource(args)` with the flat namespace.
    """

    def get_samples(self, num_samples: int) -> list[Group]:
        """`num_samples` groups of n_samples_per_prompt samples."""
        ...

    def add_samples(self, samples: list[Group]) -> None:
        """Take groups back, finished or not, for a later round."""
        ...

    def save(self, rollout_id: int) -> None:
        """Write the state after round `rollout_id`."""
        ...

    def load(self, rollout_id: int | None = None) -> None:
        """Continue after round `rollout_id`; nothing to do for None or -1."""
        ...

    def __len__(self) -> int:
        """Prompts of one epoch; 0 without a dataset."""
        ...


class RolloutDataSource:
    """Groups of n_samples_per_prompt fresh samples, prompt by prompt, epoch after epoch.

    Every epoch is shuffled by `rollout_seed + epoch` if `rollout_shuffle`. `group_index` and
    `index` count up and never repeat, also across a resume. With --disable-rollout-global-dataset
    there are no prompts: samples come empty, for a rollout function that brings its own.

    Args:
        args: flat namespace; read are hf_checkpoint, rollout_global_dataset, prompt_data and the
            flags of DatasetSpec, rollout_max_prompt_len, rollout_shuffle, rollout_seed,
            n_samples_per_prompt, save, load.

    Attributes:
        metadata: JSON-like notes of plugins; saved and restored with the state.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.dataset: Dataset | None = None
        if args.rollout_global_dataset:
            self.dataset = Dataset(dataset_spec(args), load_tokenizer(args.hf_checkpoint))
        self.epoch_id = 0
        self.sample_offset = 0
        self.sample_group_index = 0
        self.sample_index = 0
        self.metadata: dict[str, Any] = {}
        self._order = self._epoch_order()

    def __len__(self) -> int:
        return len(self.dataset) if self.dataset else 0

    def get_samples(self, num_samples: int) -> list[Group]:
        """`num_samples` groups, the next ones of the dataset."""
        return [self._group(prompt) for prompt in self._next_prompts(num_samples)]

    def add_samples(self, samples: list[Group]) -> None:
        """Refuse: this source only reads.

        Raises:
            ConfigError: always, when there is something to add.
        """
        if samples:
            raise ConfigError(
                "RolloutDataSource has no buffer to take samples back; set --data-source-path "
                "slime.rollout.data_source.RolloutDataSourceWithBuffer"
            )

    def save(self, rollout_id: int) -> None:
        """Write `{save}/rollout/global_dataset_state_dict_{rollout_id}.json`, if --save is set."""
        if self.args.save is not None:
            write_json(state_path(self.args.save, rollout_id), self.state_dict())

    def load(self, rollout_id: int | None = None) -> None:
        """Continue from the file that `save(rollout_id)` wrote below --load.

        Nothing to load for None, for a negative number (the first round), or without --load.

        Raises:
            CheckpointError: the file is missing, damaged, or of another version.
        """
        if rollout_id is None or rollout_id < 0 or self.args.load is None:
            return
        path = state_path(self.args.load, rollout_id)
        if not path.is_file():
            raise CheckpointError(
                f"cannot continue the data after round {rollout_id}: {path} is missing; --load a "
                "checkpoint of slime that has it, or begin the data anew with --start-rollout-id 0"
            )
        state = cast(dict[str, Any], read_json(path))
        if not isinstance(cast(object, state), dict) or state.get("version") != STATE_VERSION:
            raise CheckpointError(f"{path} is no data state of version {STATE_VERSION}")
        try:
            self.load_state_dict(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, SlimeError):
                raise
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}: {error}); resume from an earlier "
                "checkpoint with --ckpt-step"
            ) from error
        logger.info(
            "data continues at prompt %d of epoch %d (%s)", self.sample_offset, self.epoch_id, path
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, ready for JSON and detached from later changes."""
        return {
            "version": STATE_VERSION,
            "sample_offset": self.sample_offset,
            "epoch_id": self.epoch_id,
            "sample_group_index": self.sample_group_index,
            "sample_index": self.sample_index,
            "num_prompts": len(self),
            "metadata": encode(self.metadata),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.sample_offset = state["sample_offset"]
        self.epoch_id = state["epoch_id"]
        self.sample_group_index = state["sample_group_index"]
        self.sample_index = state["sample_index"]
        self.metadata = decode(state["metadata"])
        self._order = self._epoch_order()
        if state["num_prompts"] != len(self):
            logger.warning(
                "the checkpoint was written with %d prompts, now there are %d: prompts of this "
                "epoch may come twice or not at all",
                state["num_prompts"],
                len(self),
            )

    def _epoch_order(self) -> list[int]:
        if self.dataset is None or not self.args.rollout_shuffle:
            return list(range(len(self)))
        return self.dataset.epoch_order(self.args.rollout_seed, self.epoch_id)

    def _next_prompts(self, num_prompts: int) -> Iterator[Sample]:
        for _ in range(num_prompts):
            if self.dataset is None:
                yield Sample()
                continue
            if self.sample_offset >= len(self._order):
                self.epoch_id += 1
                self.sample_offset = 0
                self._order = self._epoch_order()
            yield self.dataset.sample(self._order[self.sample_offset])
            self.sample_offset += 1

    def _group(self, prompt: Sample) -> Group:
        group = list(_twins(prompt, self.args.n_samples_per_prompt))
        for sample in group:
            sample.group_index = self.sample_group_index
            sample.index = self.sample_index
            self.sample_index += 1
        self.sample_group_index += 1
        return group


def _twins(prompt: Sample, count: int) -> Iterator[Sample]:
    """`count` deep copies; a sample has many fields, and most need no walk to be copied."""
    copiers = {name: _copier(value) for name, value in vars(prompt).items()}
    own = [(name, copier) for name, copier in copiers.items() if copier is not None]
    for _ in range(count):
        twin = object.__new__(type(prompt))
        vars(twin).update(vars(prompt))
        for name, copier in own:
            setattr(twin, name, copier())
        yield twin


def _copier(value: Any) -> Callable[[], Any] | None:
    """Makes deep copies of `value`; None when it cannot change, so that it may be shared."""
    if isinstance(value, _ATOMS):
        return None
    copier, inside = _shallow(value)
    if copier is not None and all(isinstance(item, _ATOMS) for item in inside):
        return copier
    return partial(deepcopy, value)


def _shallow(value: Any) -> tuple[Callable[[], Any] | None, Iterable[Any]]:
    """How to copy a container itself, and what is in it; None for what is no plain container."""
    if type(value) is list:
        return value.copy, value  # pyright: ignore[reportUnknownVariableType]
    if type(value) is dict:
        return value.copy, value.values()  # pyright: ignore[reportUnknownVariableType]
    return (partial(copy, value), vars(value).values()) if is_dataclass(value) else (None, ())


class RolloutDataSourceWithBuffer(RolloutDataSource):
    """RolloutDataSource whose groups can come back; these are handed out first.

    `--buffer-filter-path` names `fn(args, rollout_id, buffer, num_samples)`, which removes groups
    from the buffer and returns them; by default the oldest. Groups in the buffer, unfinished ones
    included, are saved with the state, so that a resume loses no partial rollout.
    """

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.buffer: list[Group] = []
        path = args.buffer_filter_path
        self._buffer_filter: BufferFilter = load_function(path) if path else pop_first

    def get_samples(self, num_samples: int) -> list[Group]:
        """Groups of the buffer as far as the filter gives them, then fresh ones."""
        groups = list(self._buffer_filter(self.args, None, self.buffer, num_samples))
        return groups + super().get_samples(num_samples - len(groups))

    def add_samples(self, samples: list[Group]) -> None:
        """Take groups back, in any state of completion.

        Raises:
            DataError: a group has another length than n_samples_per_prompt, or holds something that
                is no Sample. Then none is taken.
        """
        size = self.args.n_samples_per_prompt
        for group in samples:
            if len(group) != size or not all(isinstance(cast(Any, x), Sample) for x in group):
                raise DataError(
                    f"the buffer takes groups of n_samples_per_prompt = {size} samples, found "
                    f"{[type(item).__name__ for item in group]}"
                )
        self.buffer.extend(list(group) for group in samples)

    def get_buffer_length(self) -> int:
        """Groups that wait in the buffer."""
        return len(self.buffer)

    def state_dict(self) -> dict[str, Any]:
        """As in RolloutDataSource, with the buffer.

        A group that holds something JSON cannot (a plugin's object in its metadata) is left out
        with a warning: losing one partial rollout is better than losing the checkpoint.
        """
        groups: list[Any] = []
        for group in self.buffer:
            try:
                groups.append([encode(sample.to_dict()) for sample in group])
            except TypeError as error:
                logger.warning(
                    "group %s of the buffer is not saved: %s", group[0].group_index, error
                )
        return super().state_dict() | {"buffer": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; groups of another size than now asked for are left out."""
        super().load_state_dict(state)
        saved = state.get("buffer", [])
        groups = [group for group in saved if len(group) == self.args.n_samples_per_prompt]
        if len(groups) < len(saved):
            logger.warning(
                "left out %d of %d groups of the saved buffer: --n-samples-per-prompt has changed",
                len(saved) - len(groups),
                len(saved),
            )
        self.buffer = [[Sample.from_dict(decode(item)) for item in group] for group in groups]


def pop_first(
    args: Any, rollout_id: int | None, buffer: list[Group], num_samples: int
) -> list[Group]:
    """The `num_samples` oldest groups, removed from the buffer."""
    groups = buffer[:num_samples]
    del buffer[:num_samples]
    return groups


def dataset_spec(args: Any) -> DatasetSpec:
    """The training prompts as the flags describe them.

    Raises:
        ConfigError: --prompt-data is missing.
    """
    if args.prompt_data is None:
        raise ConfigError(
            "--prompt-data is missing; name a .jsonl or .parquet file, or set "
            "--disable-rollout-global-dataset if the rollout function brings its own prompts"
        )
    return DatasetSpec(
        path=args.prompt_data,
        input_key=args.input_key,
        label_key=args.label_key,
        metadata_key=args.metadata_key,
        tool_key=args.tool_key,
        multimodal_keys=args.multimodal_keys,
        apply_chat_template=args.apply_chat_template,
        apply_chat_template_kwargs=args.apply_chat_template_kwargs,
        max_prompt_len=args.rollout_max_prompt_len,
    )


def state_path(root: str, rollout_id: int) -> Path:
    """Where the state after round `rollout_id` lies below a checkpoint folder.

    The stem is the documented one; the suffix differs, because the content is JSON.
    """
    return Path(root) / "rollout" / f"global_dataset_state_dict_{rollout_id}.json"
