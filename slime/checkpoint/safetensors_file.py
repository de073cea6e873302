"""A safetensors file written tensor by tensor: the library's own writer holds all bytes, twice.

Source: the format, https://github.com/huggingface/safetensors#format.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from slime.errors import CheckpointError
from slime.observability.disk import FULL

# Called when the disk is full, with the error: comes back to try again, or raises.
MakeRoom = Callable[[OSError], None]

# Room before the first tensor for the header, which is known last; spaces fill it up.
_ROOM = 64 * 2**10
_BLOCK_BYTES = 16 * 2**20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class SafetensorsFile:
    """The file at `path`, which is whole after `close`.

    Args:
        make_room: called when the disk is full; without it that is an OSError.
    """

    def __init__(self, path: Path, make_room: MakeRoom | None = None) -> None:
        self._path = path
        self._make_room = make_room
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = 0
        self._crc = 0
        # Without a buffer: what a write that failed left in one could not be told.
        self._stream: BinaryIO = cast(BinaryIO, path.open("wb", buffering=0))
        self._stream.seek(_ROOM)

    def has_room(self, tensor: Tensor, max_bytes: int) -> bool:
        """Whether this tensor fits, and would be aligned as its dtype asks for."""
        is_aligned = self._end % tensor.element_size() == 0
        return is_aligned and self._end + tensor.nbytes <= max_bytes

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor on the CPU, contiguous."""
        start, self._end = self._end, self._end + tensor.nbytes
        self._header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self._end],
        }
        if tensor.nbytes:
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            self._crc = zlib.crc32(data, self._crc)
            self._write(data)

    def close(self) -> None:
        """Write the header, in the room for it or, where that is too small, into a new file."""
        words = json.dumps(self._header, separators=(",", ":")).encode()
        if 8 + len(words) <= _ROOM:
            self._stream.seek(0)
            self._write(memoryview(_header(words, _ROOM)))
            self._stream.close()
            return
        self._stream.close()
        draft = self._path.with_name(f"{self._path.name}.draft")
        self._path.rename(draft)
        with draft.open("rb") as source, self._path.open("wb") as target:
            target.write(_header(words, 8 + len(words) + -len(words) % 8))
            source.seek(_ROOM)
            shutil.copyfileobj(source, target, _BLOCK_BYTES)
        draft.unlink()

    def _write(self, data: memoryview) -> None:
        """All of it, also where one write takes a part."""
        while data:
            try:
                data = data[self._stream.write(data) :]
            except OSError as error:
                if self._make_room is None or error.errno not in FULL:
                    raise
                self._make_room(error)

    def abandon(self) -> None:
        """Close and remove what is not whole."""
        self._stream.close()
        self._path.unlink(missing_ok=True)

    def verify(self) -> None:
        """Read the closed file again.

        Raises:
            CheckpointError: its tensors are not what was written.
        """
        crc, left = 0, self._end
        with self._path.open("rb") as stream:
            stream.seek(-self._end, 2)
            while left and (block := stream.read(min(left, _BLOCK_BYTES))):
                crc, left = zlib.crc32(block, crc), left - len(block)
        if left or crc != self._crc:
            raise CheckpointError(
                f"{self._path} reads back as something else than was written; the disk may be failing"
            )


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file.

    Attributes:
        dtype: as the format spells it, `BF16`.
        start, end: first byte in the file, and the one after the last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors in a file by name.

    Raises:
        CheckpointError: it is no safetensors file, or cut short.
    """
    try:
        with path.open("rb") as stream:
            room = int.from_bytes(stream.read(8), "little")
            size = path.stat().st_size
            if room > size:
                raise ValueError(f"a header of {room} bytes in {size}")
            rows = cast("dict[str, dict[str, Any]]", json.loads(stream.read(room)))
        stored = {
            name: Stored(
                row["dtype"],
                tuple(row["shape"]),
                *(8 + room + int(offset) for offset in row["data_offsets"]),
            )
            for name, row in rows.items()
            if name != "__metadata__"
        }
        end = max((one.end for one in stored.values()), default=0)
        if end > size:
            raise ValueError(f"tensors up to byte {end} in {size}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}; write it anew") from error
    return stored


def _header(words: bytes, size: int) -> bytes:
    """The header's length and words, with spaces up to `size` bytes together."""
    return (size - 8).to_bytes(8, "little") + words.ljust(size - 8)
