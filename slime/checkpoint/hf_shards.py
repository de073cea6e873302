"""Files of a Hugging Face folder that grows: written tensor by tensor, found again after an interruption."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from slime.checkpoint.hf import INDEX_NAME, SINGLE_NAME, read_json
from slime.checkpoint.ranks import Ranks
from slime.checkpoint.safetensors_file import MakeRoom, SafetensorsFile
from slime.errors import CheckpointError

# In a folder that grows: what is written there.
RESUME_NAME = "resume.key"


# Name -> (dtype as torch spells it, bytes) of the tensors in one file.
Contents = dict[str, tuple[str, int]]


def written_shards(partial: Path, resume_key: str | None) -> dict[int, Contents]:
    """Number -> what is in it, of the whole files of an interrupted write with this key."""
    key = partial / RESUME_NAME
    if resume_key is None or not key.is_file() or key.read_text(encoding="utf-8") != resume_key:
        return {}
    shards: dict[int, Contents] = {}
    for path in partial.glob("shard-*.json"):
        rows = cast("dict[str, list[Any]]", read_json(path))
        number = int(path.stem.removeprefix("shard-"))
        contents = {name: (str(dtype), int(size)) for name, (dtype, size) in rows.items()}
        file = path.with_suffix(".tmp")
        num_bytes = sum(size for _, size in contents.values())
        if file.is_file() and file.stat().st_size > num_bytes:  # it has a header besides
            shards[number] = contents
    return dict(sorted(shards.items()))


class ShardWriter:
    """Tensors into files of at most `max_bytes` as they come, named when all are there and counted.

    Args:
        written: the files that are there already.
        ranks: each has every `size`-th number after theirs.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        written: dict[int, Contents],
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
        self._contents: Contents = {}
        self._shards: list[int] = []
        self._number, self._step = max(written, default=-1) + 1 + ranks.rank, ranks.size
        self._total_bytes = 0
        self._bytes_by_dtype: dict[torch.dtype, int] = {}
        self.take_in(written)

    def take_in(self, written: dict[int, Contents]) -> None:
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

    def _count(self, number: int, contents: Contents) -> None:
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
            write_json(self._contents_path(self._number), self._contents)
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
        (self._folder / RESUME_NAME).unlink(missing_ok=True)
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
            write_json(self._folder / INDEX_NAME, index)

    def _path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard}.tmp"

    def _contents_path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard}.json"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A file with this object."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
