"""Megatron's checkpoint format `torch_dist`, written and read tensor by tensor without Megatron.

It is torch's distributed checkpoint: files of tensors, each as `torch.save` writes it, and an index
of which part of which whole tensor stands where. A tensor may be in parts of any cut, so one is
written as it comes and read whatever ranks have written it.

Source: torch.distributed.checkpoint, version 2.11; Megatron-Core 0.19.2 adds `metadata.json` and one
object, `common_state`.
"""

import io
import json
import os
import pickle
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    _StorageInfo,  # pyright: ignore[reportPrivateUsage]
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from slime.errors import CheckpointError

Shape = tuple[int, ...]

_COMMON_KEY = "common_state/shard_0_1"
_INDEX_NAME = ".metadata"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_READ_BYTES = 16 * 2**20
# Parts that are kept while neighbours of what was asked for are likely to be asked for next.
_CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Part:
    """One part of a tensor in a file.

    Attributes:
        key, shape: of the whole tensor.
        offsets, sizes: of the part.
        dtype: as torch spells it, `bfloat16`.
        start, length: bytes in the file.
        crc: of those bytes.
    """

    key: str
    shape: Shape
    offsets: Shape
    sizes: Shape
    dtype: str
    start: int
    length: int
    crc: int


class SectionWriter:
    """One file of tensors, `NAME.distcp`, and beside it what stands where.

    It grows as `NAME.distcp.partial` and has its name once it is whole, so an interrupted write is
    taken up with the next section. Use it as a context manager.

    Args:
        folder: of the checkpoint that grows.
        name: of the section; letters, digits, dots, dashes.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._file, self._parts_file = _files_of(folder, name)
        self._draft = self._file.with_name(f"{self._file.name}.partial")
        self._parts: list[Part] = []
        self._stream: BinaryIO | None = None

    def __enter__(self) -> "SectionWriter":
        self._stream = self._draft.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        assert self._stream is not None, "entered"
        if kind is not None:
            self._stream.close()
            self._draft.unlink(missing_ok=True)
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._parts_file.write_text(json.dumps([asdict(part) for part in self._parts]))
        os.replace(self._draft, self._file)

    def add(self, key: str, tensor: Tensor, *, shape: Shape, offsets: Shape, sizes: Shape) -> None:
        """Write `tensor`, in the form `sizes`, as the part at `offsets` of the whole `key`."""
        assert self._stream is not None, "entered"
        content = tensor.detach().reshape(sizes).contiguous()
        # A view would be saved with all it is a view of.
        if content.untyped_storage().nbytes() != _num_bytes(content):
            content = content.clone()
        start, counted = self._stream.tell(), _CountingStream(self._stream)
        torch.save(content, cast(Any, counted))
        dtype = str(tensor.dtype).removeprefix("torch.")
        length = self._stream.tell() - start
        self._parts.append(Part(key, shape, offsets, sizes, dtype, start, length, counted.crc))


class _CountingStream(io.RawIOBase):
    """Passes bytes on to a file and sums them up."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self.crc = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return self._stream.write(data)


def is_written(folder: Path, name: str) -> bool:
    """Whether this section is whole."""
    file, parts_file = _files_of(folder, name)
    if not (file.is_file() and parts_file.is_file()):
        return False
    parts = _read_parts(parts_file)
    return file.stat().st_size == sum(part.length for part in parts)


def _files_of(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.distcp", folder / f"{name}.parts.json"


def _read_parts(path: Path) -> list[Part]:
    rows = cast("list[dict[str, Any]]", json.loads(path.read_text()))
    sizes = ("shape", "offsets", "sizes")

    def as_part(row: dict[str, Any]) -> Part:
        values: dict[str, Any] = {**row, **{name: tuple(row[name]) for name in sizes}}
        return Part(**values)

    return [as_part(row) for row in rows]


def verify_section(folder: Path, name: str) -> int:
    """Read a section again; the bytes that were compared.

    Raises:
        CheckpointError: a part is not what was written.
    """
    file, parts_file = _files_of(folder, name)
    total = 0
    with file.open("rb") as stream:
        for part in _read_parts(parts_file):
            stream.seek(part.start)
            crc, left = 0, part.length
            while left and (block := stream.read(min(left, _READ_BYTES))):
                crc, left = zlib.crc32(block, crc), left - len(block)
            if left or crc != part.crc:
                raise CheckpointError(
                    f"{file}: {part.key} at {list(part.offsets)} reads back as something else; the "
                    "disk may be failing. Remove the folder and convert again."
                )
            total += part.length
    return total


def finish_checkpoint(folder: Path, names: Sequence[str], common: dict[str, Any]) -> None:
    """Write the index over the sections, after which the folder is a checkpoint.

    Args:
        names: of all its sections.
        common: what all ranks get: numbers, words, lists and dicts of them.

    Raises:
        CheckpointError: a section is missing, or parts of a tensor overlap or leave a gap.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name in names:
        file, parts_file = _files_of(folder, name)
        if not is_written(folder, name):
            raise CheckpointError(f"{file} is missing or not whole; run the conversion again.")
        for part in _read_parts(parts_file):
            _enter(part, file.name, tensors, places)
    for key, tensor in tensors.items():
        found = sum(chunk.sizes.numel() for chunk in tensor.chunks)
        if found != tensor.size.numel():
            raise CheckpointError(
                f"{key} has {tensor.size.numel()} numbers, its parts have {found} together."
            )
    content = io.BytesIO()
    torch.save([common], content)
    (folder / "common.distcp").write_bytes(content.getvalue())
    index = MetadataIndex(_COMMON_KEY)
    places[index] = _StorageInfo("common.distcp", 0, content.getbuffer().nbytes)
    metadata = Metadata(
        state_dict_metadata={**tensors, _COMMON_KEY: BytesStorageMetadata()}, storage_data=places
    )
    (folder / _INDEX_NAME).write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps(_FORMAT))
    for name in names:
        _files_of(folder, name)[1].unlink()


def _enter(
    part: Part,
    file_name: str,
    tensors: dict[str, TensorStorageMetadata],
    places: dict[MetadataIndex, _StorageInfo],
) -> None:
    dtype = cast(torch.dtype, getattr(torch, part.dtype))
    whole = tensors.setdefault(
        part.key,
        TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(part.shape), []),
    )
    if (whole.size, whole.properties.dtype) != (torch.Size(part.shape), dtype):
        raise CheckpointError(
            f"{part.key} is [{', '.join(map(str, whole.size))}] in {whole.properties.dtype} in one "
            f"place and {list(part.shape)} in {dtype} in another."
        )
    offsets = torch.Size(part.offsets)
    index = MetadataIndex(part.key, offsets, len(whole.chunks))
    if index in places:
        raise CheckpointError(f"{part.key} at {list(part.offsets)} came twice.")
    whole.chunks.append(ChunkStorageMetadata(offsets, torch.Size(part.sizes)))
    places[index] = _StorageInfo(file_name, part.start, part.length)


class TorchDistFolder:
    """One iteration of a checkpoint, read-only; parts of tensors, a file's part at a time.

    Raises:
        CheckpointError: it is none, or its index cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / _INDEX_NAME).is_file():
            raise CheckpointError(
                f"{path} has no {_INDEX_NAME}; name one iteration of a torch_dist checkpoint "
                "(iter_0000010, release), or the folder that holds them."
            )
        try:
            self._metadata = FileSystemReader(self.path).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
            raise CheckpointError(f"{self.path / _INDEX_NAME} is damaged: {error}") from error
        self._places = cast("dict[MetadataIndex, _StorageInfo]", self._metadata.storage_data)
        self._cache: OrderedDict[MetadataIndex, Tensor] = OrderedDict()

    def shapes(self) -> dict[str, Shape]:
        """Whole shape of each tensor."""
        return {
            key: tuple(value.size)
            for key, value in self._metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def tensor(self, key: str, offsets: Shape, sizes: Shape) -> Tensor:
        """The part of tensor `key` at `offsets`, of `sizes`, on the CPU.

        Raises:
            CheckpointError: there is no such tensor or part, or its file is damaged.
        """
        whole = self._metadata.state_dict_metadata.get(key)
        if not isinstance(whole, TensorStorageMetadata):
            raise CheckpointError(f"{self.path} has no tensor {key}; is it another model's?")
        result = torch.empty(sizes, dtype=whole.properties.dtype)
        missing = result.numel()
        for chunk in whole.chunks:
            overlap = _overlap(offsets, sizes, tuple(chunk.offsets), tuple(chunk.sizes))
            if overlap is None:
                continue
            here, there = overlap
            content = self._chunk(MetadataIndex(key, chunk.offsets), tuple(chunk.sizes))
            result[here] = content[there]
            missing -= result[here].numel()
        if missing:
            raise CheckpointError(f"{self.path}: {missing} numbers of {key} are in no file.")
        return result

    def _chunk(self, index: MetadataIndex, sizes: Shape) -> Tensor:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        place = self._places[index]
        path = self.path / place.relative_path
        try:
            with path.open("rb") as stream:
                stream.seek(place.offset)
                data = io.BytesIO(stream.read(place.length))
            content = cast(Tensor, torch.load(data, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{path}: {index.fqn} cannot be read ({error}); copy the checkpoint again"
            ) from error
        content = content.detach().reshape(sizes)
        self._cache[index] = content
        while len(self._cache) > 1 and sum(map(_num_bytes, self._cache.values())) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return content


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


Slices = tuple[slice, ...]


def _overlap(
    offsets: Shape, sizes: Shape, chunk_offsets: Shape, chunk_sizes: Shape
) -> tuple[Slices, Slices] | None:
    """What both have, in the coordinates of the first and of the second; None if that is nothing."""
    here: list[slice] = []
    there: list[slice] = []
    for start, size, other, length in zip(offsets, sizes, chunk_offsets, chunk_sizes, strict=True):
        first, stop = max(start, other), min(start + size, other + length)
        if first >= stop:
            return None
        here.append(slice(first - start, stop - start))
        there.append(slice(first - other, stop - other))
    return tuple(here), tuple(there)
