"""Hugging Face folders: safetensors read tensor by tensor, and written as a stream of shards."""

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slime.checkpoint.block_fp8 import SCALE_SUFFIX, dequantized, is_scale
from slime.checkpoint.ranks import Ranks
from slime.checkpoint.safetensors_file import MakeRoom, SafetensorsFile
from slime.checkpoint.stacked import ExpertPart, is_stack, parts_of_stack
from slime.errors import CheckpointError
from slime.observability.disk import write_failure

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5 * 1024**3

# Pages of an open file count as memory of this process once they are read: only a few files stay
# open, and one of which much was read is opened anew.
_MAX_OPEN_FILES = 3
_MAX_MAPPED_BYTES = 2**30
# In a folder that grows: what is written there.
_RESUME_NAME = "resume.key"
# What a model folder holds besides weights: config, tokenizer, templates, custom code.
_COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}


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
            shards = _read_json(index).get("weight_map")
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
    return _read_json(config)


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


def write_hf_folder(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config_from: str | Path,
    dtype: torch.dtype | None = None,
    keep_dtype: Collection[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    expected: Iterable[str] | None = None,
    overwrite: bool = False,
    config_changes: Mapping[str, Any] | None = None,
    verifies: bool = False,
    resume_key: str | None = None,
    ranks: Ranks | None = None,
    index_metadata: Callable[[], Mapping[str, Any]] | None = None,
    make_room: MakeRoom | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM` loads, as the tensors come.

    Each tensor is written when it comes. All goes to the side folder `<path>.partial`, which gets
    its name when it is whole: a folder named `path` is never half-written.

    Args:
        tensors: (name on disk, whole tensor), each once; `lm_head.weight` is left out when the
            config ties it.
        config_from: the folder whose config, tokenizer and templates are copied.
        dtype: cast floating-point tensors to it; None keeps theirs. The written config states it.
        keep_dtype: names that are not cast: `Mapping.hf_buffers`.
        expected: names that must have come, no more and no less; None does not check.
        overwrite: replace a folder that is there.
        config_changes: keys of the written config that differ.
        verifies: read every file again and compare.
        resume_key: says what is written. An interrupted write stays as far as its files are whole, and
            one with the same key goes on there: `tensors` then leaves out `names_written`.
        ranks: processes that write one folder together, each its own `tensors` into files of its own;
            `expected` are those of all. It needs a `resume_key`.
        index_metadata: called when all tensors are written: what the index says besides. There is an
            index then also for a single file, and for no tensor at all.
        make_room: as `SafetensorsFile` has it.

    Raises:
        CheckpointError: `path` is there and not empty, a name came twice, or the names are not
            `expected`.
    """
    target = Path(path)
    if target.exists() and not overwrite and (target.is_file() or any(target.iterdir())):
        raise CheckpointError(
            f"{target} is there and not empty; name another folder, or remove it."
        )
    ranks = ranks or Ranks()
    config = read_hf_config(config_from)
    tied = bool(config.get("tie_word_embeddings", False))
    partial = _partial_of(target)
    written = _written_shards(partial, resume_key)
    assert ranks.size == 1 or resume_key is not None, "the others would not find the files"
    ranks.barrier()  # all know what is there before one of them writes
    if ranks.rank == 0:
        _begin(partial, resume_key, written)
    ranks.barrier()
    shards = _ShardWriter(
        partial, max_shard_bytes, written, ranks, verifies=verifies, make_room=make_room
    )
    try:
        for name, tensor in tensors:
            if not (tied and name == "lm_head.weight"):
                shards.add(name, _prepare(tensor, None if name in keep_dtype else dtype))
        shards.close()
        ranks.barrier()
        if ranks.rank == 0:
            shards.take_in(_written_shards(partial, resume_key) if ranks.size > 1 else {})
            if expected is not None:
                check_names(shards.shard_of, expected, where=f"the model written to {target}")
            shards.finish(None if index_metadata is None else index_metadata())
            _copy_companions(Path(config_from), partial)
            _write_config(partial, config, shards.main_dtype(), config_changes or {})
            _put_in_place(partial, target)
        ranks.barrier()
    except BaseException as error:
        shards.abandon()
        if resume_key is None:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(write_failure(target, error)) from error
        raise


def _begin(partial: Path, resume_key: str | None, written: Collection[int]) -> None:
    """Leave the whole files in the side folder, and nothing when there are none."""
    if written:
        for path in partial.glob("shard-*.tmp"):
            if int(path.stem.removeprefix("shard-")) not in written:
                path.unlink()
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if resume_key is not None:
        (partial / _RESUME_NAME).write_text(resume_key, encoding="utf-8")


def names_written(path: str | Path, resume_key: str) -> set[str]:
    """Names that an interrupted `write_hf_folder` with this key has in whole files."""
    shards = _written_shards(_partial_of(Path(path)), resume_key)
    return {name for contents in shards.values() for name in contents}


# Name -> (dtype as torch spells it, bytes) of the tensors in one file.
_Contents = dict[str, tuple[str, int]]


def _partial_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _written_shards(partial: Path, resume_key: str | None) -> dict[int, _Contents]:
    """Number -> what is in it, of the whole files of an interrupted write with this key."""
    key = partial / _RESUME_NAME
    if resume_key is None or not key.is_file() or key.read_text(encoding="utf-8") != resume_key:
        return {}
    shards: dict[int, _Contents] = {}
    for path in partial.glob("shard-*.json"):
        rows = cast("dict[str, list[Any]]", _read_json(path))
        number = int(path.stem.removeprefix("shard-"))
        contents = {name: (str(dtype), int(size)) for name, (dtype, size) in rows.items()}
        file = path.with_suffix(".tmp")
        num_bytes = sum(size for _, size in contents.values())
        if file.is_file() and file.stat().st_size > num_bytes:  # it has a header besides
            shards[number] = contents
    return dict(sorted(shards.items()))


class _ShardWriter:
    """Tensors into files of at most `max_bytes` as they come, named when all are there and counted.

    Args:
        written: the files that are there already.
        ranks: each has every `size`-th number after theirs.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        written: dict[int, _Contents],
        ranks: Ranks,
        *,
        verifies: bool,
        make_room: MakeRoom | None,
    ) -> None:
        self._verifies = verifies
        self._make_room = make_room
        self.shard_of: dict[str, int] = {}
        self._folder = folder
        self._max_bytes = max_bytes
        self._file: SafetensorsFile | None = None
        self._contents: _Contents = {}
        self._shards: list[int] = []
        self._number, self._step = max(written, default=-1) + 1 + ranks.rank, ranks.size
        self._total_bytes = 0
        self._bytes_by_dtype: dict[torch.dtype, int] = {}
        self.take_in(written)

    def take_in(self, written: dict[int, _Contents]) -> None:
        """Count the files that are there, of this process and others."""
        for number, contents in written.items():
            if number not in self._shards:
                self._count(number, contents)
                self._shards.append(number)

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self.shard_of:
            raise CheckpointError(f"{name} came twice; a checkpoint holds each tensor once.")
        if self._file is not None and not self._file.has_room(tensor, self._max_bytes):
            self.close()
        if self._file is None:
            self._file = SafetensorsFile(self._path(self._number), self._make_room)
        self._file.add(name, tensor)
        row = (str(tensor.dtype).removeprefix("torch."), tensor.nbytes)
        self._contents[name] = row
        self._count(self._number, {name: row})

    def _count(self, number: int, contents: _Contents) -> None:
        for name, (word, size) in contents.items():
            if name in self.shard_of:
                raise CheckpointError(f"{name} came twice; a checkpoint holds each tensor once.")
            self.shard_of[name] = number
            self._total_bytes += size
            dtype = cast(torch.dtype, getattr(torch, word))
            if dtype.is_floating_point:
                self._bytes_by_dtype[dtype] = self._bytes_by_dtype.get(dtype, 0) + size

    def main_dtype(self) -> torch.dtype | None:
        """The floating-point dtype most bytes have."""
        return max(self._bytes_by_dtype, key=self._bytes_by_dtype.__getitem__, default=None)

    def close(self) -> None:
        """End the file that is being written, if there is one."""
        if self._file is not None:
            self._file.close()
            if self._verifies:
                self._file.verify()
            _write_json(self._contents_path(self._number), self._contents)
            self._file, self._contents = None, {}
            self._shards.append(self._number)
            self._number += self._step

    def abandon(self) -> None:
        """Forget the file that is being written; those before it stay."""
        if self._file is not None:
            self._file.abandon()
            self._file = None

    def finish(self, metadata: Mapping[str, Any] | None) -> None:
        """Give all files their names, and write the index if there are several or metadata for it."""
        if not self.shard_of and metadata is None:
            raise CheckpointError(f"No tensor came for {self._folder}; there is nothing to write.")
        (self._folder / _RESUME_NAME).unlink(missing_ok=True)
        total = len(self._shards)
        names = {
            number: f"model-{i + 1:05d}-of-{total:05d}.safetensors" if total > 1 else SINGLE_NAME
            for i, number in enumerate(sorted(self._shards))
        }
        for number, name in names.items():
            self._contents_path(number).unlink()
            self._path(number).rename(self._folder / name)
        if total > 1 or metadata is not None:
            index = {
                "metadata": {"total_size": self._total_bytes, **(metadata or {})},
                "weight_map": {name: names[shard] for name, shard in self.shard_of.items()},
            }
            _write_json(self._folder / INDEX_NAME, index)

    def _path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard}.tmp"

    def _contents_path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard}.json"


def _prepare(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the CPU and in one piece, cast if it is of floating point."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", wanted).contiguous()


def _copy_companions(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        is_companion = file.suffix in _COMPANION_SUFFIXES and not file.name.endswith(".index.json")
        if file.is_file() and (is_companion or file.name.startswith("LICENSE")):
            shutil.copyfile(file, folder / file.name)


def _write_config(
    folder: Path,
    config: dict[str, Any],
    dtype: torch.dtype | None,
    changes: Mapping[str, Any],
) -> None:
    # transformers casts to the dtype the config states, so it has to be the one in the files.
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    stated = {} if dtype is None else {key: str(dtype).removeprefix("torch.")}
    if dtype is None or dtype.itemsize > 1:  # weights in 8 bits were read as bf16
        config = {name: value for name, value in config.items() if name != "quantization_config"}
    _write_json(folder / "config.json", config | stated | dict(changes))


def _put_in_place(partial: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def read_index_metadata(folder: str | Path) -> dict[str, Any]:
    """What the index of a folder says besides where the tensors are; nothing without an index.

    Raises:
        CheckpointError: the index is no valid JSON.
    """
    index = Path(folder) / INDEX_NAME
    found = _read_json(index).get("metadata") if index.is_file() else None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {content!r:.80}")
    return cast(dict[str, Any], content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
