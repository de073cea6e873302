"""Reads the records of an offline run of W&B: a LevelDB log of protobuf messages."""

import struct
from importlib import import_module
from pathlib import Path
from typing import Any

_HEAD = 7
_BLOCK = 32768


def read_records(path: Path) -> list[Any]:
    """The records of a `.wandb` file, in order."""
    data = path.read_bytes()
    record: Any = import_module("wandb.proto.wandb_internal_pb2").Record
    records: list[Any] = []
    place, parts = _HEAD, b""  # the file's own head is as long as a chunk's
    while place + _HEAD <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEAD:
            place += left  # the rest of a block is padding
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + _HEAD])
        parts += data[place + _HEAD : place + _HEAD + size]
        place += _HEAD + size
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(record.FromString(parts))
            parts = b""
    return records
