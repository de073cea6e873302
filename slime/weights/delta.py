"""A tensor's bytes as what changed in them since the version before, and the way back.

Source: slime's documentation of its delta weight sync: bytes by xor or overwritten, zstd at level 1, a checksum of
each tensor.
"""

import zlib
from dataclasses import dataclass
from typing import Any, Literal

import blake3
import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from slime.errors import CheckpointError

Encoding = Literal["xor", "overwrite"]
Checksum = Literal["xxh3-128", "blake3", "adler32"]
Bytes = npt.NDArray[np.uint8]

_LEVEL = 1


@dataclass(frozen=True)
class Change:
    """What changed in a tensor.

    Attributes:
        data: compressed; see `decode`.
        num_changed: bytes that differ.
    """

    data: bytes
    num_changed: int


def encode(old: Bytes, new: Bytes, encoding: Encoding) -> Change | None:
    """What makes `old` to `new`; None when they are the same.

    Args:
        old, new: [n] bytes.
    """
    differs = old ^ new
    num_changed = int(np.count_nonzero(differs))
    if not num_changed:
        return None
    if encoding == "xor":
        raw = differs
    else:
        places = differs != 0
        raw = np.concatenate([np.packbits(places), new[places]])
    return Change(zstandard.ZstdCompressor(level=_LEVEL).compress(_buffer(raw)), num_changed)


def decode(data: bytes, old: Bytes, encoding: Encoding) -> Bytes:
    """[n] bytes: `old` with a change made.

    `xor` has one byte for each of the tensor's. `overwrite` has a bit for each, which tells whether it
    changed, then the new values of those that did; made twice it does the same.

    Raises:
        CheckpointError: the change is damaged, or of a tensor of another size.
    """
    num_mask = -(-len(old) // 8)
    most = len(old) if encoding == "xor" else num_mask + len(old)
    try:
        text = zstandard.ZstdDecompressor().decompress(data, max_output_size=most)
    except zstandard.ZstdError as error:
        raise CheckpointError(f"the change cannot be read: {error}") from error
    raw = np.frombuffer(text, dtype=np.uint8)
    if encoding == "xor":
        if len(raw) != len(old):
            raise CheckpointError(f"the change is of {len(raw)} bytes, the tensor has {len(old)}")
        return old ^ raw
    if len(raw) < num_mask:
        raise CheckpointError(f"the change is cut short: {len(raw)} bytes")
    places = np.unpackbits(raw[:num_mask], count=len(old)).view(np.bool_)
    values = raw[num_mask:]
    if len(values) != np.count_nonzero(places):
        raise CheckpointError(f"the change has {len(values)} values for other places")
    new = old.copy()
    new[places] = values
    return new


def checksum_of(data: Bytes, kind: Checksum) -> str:
    """Checksum of the bytes, in hexadecimal."""
    if kind == "adler32":
        return f"{zlib.adler32(_buffer(data)):08x}"
    hasher: Any = xxhash.xxh3_128_hexdigest if kind == "xxh3-128" else _blake3
    return str(hasher(_buffer(data)))


def _blake3(data: memoryview) -> str:
    return blake3.blake3(data).hexdigest()


def _buffer(data: Bytes) -> memoryview:
    return memoryview(np.ascontiguousarray(data))
