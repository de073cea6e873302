"""Hugging Face folders: safetensors read tensor by tensor."""

import json
from collections import OrderedDict
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from slime.checkpoint.block_fp8 import SCALE_SUFFIX, dequantized, is_scale
from slime.checkpoint.stacked import ExpertPart, is_stack, parts_of_stack
from slime.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Pages of an open file count as memory of this process once they are read: only a few files stay
# open, and one of which much was read is opened anew.
_MAX_OPEN_FILES = 3
_MAX_MAPPED_BYTES = 2**30


class HfFolder:
    """A Hugging Face model folder, read-only. Tensors come from memory-mapped files, one at a time.

    Use it as a context manager, or call `close`: it holds the last few files it has read open.
    Experts have the names of the published checkpoints, a tensor for each matrix, also where the
    folder keeps them stacked as transformers 5 does in memory (see `stacked`). Weights in 8 bits come
    in bf16, and their scales are no tensors (see `block_fp8`).

    Example:
        with HfFolder("/models/Qwen3-4B") as folder:
            embedding = folder.tensor("model.embed_tokens.weight")
    """

    def __init__(self, path: str | Path) -> None:
        """Read config and index; no tensor yet.

        Raises:
            CheckpointError: no such folder, no `config.json`, or no safetensors in it.
        """
        self.path = Path(path)
        self.config = read_hf_config(self.path)
        self._open: OrderedDict[str, tuple[Any, ExitStack]] = OrderedDict()
        self._mapped: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; tensors already read stay valid."""
        for shard in list(self._open):
            self._close(shard)

    def _close(self, shard: str) -> None:
        _, file = self._open.pop(shard)
        self._mapped.pop(shard, None)
        file.close()

    def names(self) -> tuple[str, ...]:
        """All tensor names, those of stacked experts one by one."""
        whole = (name for name in self._shard_of if not (is_stack(name) or is_scale(name)))
        return (*whole, *self._expert_parts)

    def stored_dtypes(self) -> dict[str, str]:
        """Name -> dtype as safetensors spells it (`F8_E4M3`), of what the files hold: stacks and scales too."""
        by_file = sorted(self._shard_of, key=self._shard_of.__getitem__)
        return {name: self._file_of(name).get_slice(name).get_dtype() for name in by_file}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from its file's header.

        Raises:
            CheckpointError: no such tensor.
        """
        part = self._expert_parts.get(name)
        return part.shape if part is not None else self._shape_in_file(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, in the file's dtype; of 8-bit numbers with scales, bf16.

        Raises:
            CheckpointError: no such tensor, or the file is cut short.
        """
        part = self._expert_parts.get(name)
        if part is not None:
            found: Tensor = self._file_of(part.stack).get_slice(part.stack)[part.expert, part.rows]
            self._count(part.stack, found)
            return found
        found = self._file_of(name).get_tensor(name)
        self._count(name, found)
        scales = f"{name}{SCALE_SUFFIX}"
        if scales not in self._shard_of:
            return found
        return dequantized(name, found, self._file_of(scales).get_tensor(scales))

    def _count(self, name: str, found: Tensor) -> None:
        """Note what was read of a file, and let go of one of which it was much."""
        shard = self._shard_of[name]
        self._mapped[shard] = self._mapped.get(shard, 0) + found.nbytes
        if self._mapped[shard] > _MAX_MAPPED_BYTES:
            self._close(shard)

    @cached_property
    def _expert_parts(self) -> dict[str, ExpertPart]:
        stacks = [name for name in self._shard_of if is_stack(name)]
        return {
            name: part
            for stack in stacks
            for name, part in parts_of_stack(stack, self._shape_in_file(stack)).items()
        }

    def _shape_in_file(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of(name).get_slice(name).get_shape())

    @cached_property
    def _shard_of(self) -> dict[str, str]:
        index = self.path / INDEX_NAME
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise CheckpointError(f"{index} has no weight_map; download or copy it again")
            return cast("dict[str, str]", shards)
        files = sorted(path.name for path in self.path.glob("*.safetensors"))
        if files != [SINGLE_NAME]:
            raise CheckpointError(
                f"{self.path} has neither {INDEX_NAME} nor just {SINGLE_NAME}, but "
                f"{', '.join(files) or 'no safetensors files'}; is the download complete?"
            )
        return dict.fromkeys(self._shard(SINGLE_NAME).keys(), SINGLE_NAME)

    def _file_of(self, name: str) -> Any:
        shard = self._shard_of.get(name)
        if shard is None:
            raise CheckpointError(f"{self.path} has no tensor {name}; is it of this architecture?")
        return self._shard(shard)

    # safetensors ships no types.
    def _shard(self, file_name: str) -> Any:
        if file_name in self._open:
            self._open.move_to_end(file_name)
        else:
            path = self.path / file_name
            if not path.is_file():
                raise CheckpointError(
                    f"{INDEX_NAME} names {path}, which is missing; is the download complete?"
                )
            file = ExitStack()
            try:
                self._open[file_name] = file.enter_context(safe_open(path, framework="pt")), file
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} ({path.stat().st_size} bytes) is damaged or cut short ({error}); "
                    "download or copy it again"
                ) from error
            if len(self._open) > _MAX_OPEN_FILES:
                self._close(next(iter(self._open)))
        return self._open[file_name][0]


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder.

    Raises:
        CheckpointError: there is none.
    """
    config = Path(path) / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{path} is no Hugging Face folder: it has no config.json. Download a model of the hub "
            "first, and give the folder it lies in."
        )
    return read_json(config)


def check_names(
    found: Iterable[str],
    expected: Iterable[str],
    *,
    ignored: Collection[str] = (),
    where: str | Path,
) -> None:
    """Nothing, when `found` holds exactly `expected`, give or take `ignored`.

    Raises:
        CheckpointError: names the missing and the left-over ones.
    """
    found, expected = set(found), set(expected)
    problems = [
        f"{len(names)} {word}: {', '.join(sorted(names)[:8])}{', ...' if len(names) > 8 else ''}"
        for word, names in (
            ("missing", expected - found - set(ignored)),
            ("left over", found - expected - set(ignored)),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"The tensors of {where} are not those of its architecture; {'; '.join(problems)}."
        )


def read_index_metadata(folder: str | Path) -> dict[str, Any]:
    """What the index of a folder says besides where the tensors are; nothing without an index.

    Raises:
        CheckpointError: the index is no valid JSON.
    """
    index = Path(folder) / INDEX_NAME
    found = read_json(index).get("metadata") if index.is_file() else None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {content!r:.80}")
    return cast(dict[str, Any], content)
