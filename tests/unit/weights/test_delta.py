"""What changed in a tensor's bytes, and the way back."""

import zlib

import blake3
import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from slime.errors import CheckpointError
from slime.weights.delta import Encoding, checksum_of, decode, encode

ENCODINGS: tuple[Encoding, ...] = ("xor", "overwrite")


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two strings of one length."""
    old = draw(st.binary(min_size=1, max_size=300))
    new = bytearray(old)
    for place in draw(st.sets(st.integers(0, len(old) - 1))):
        new[place] = draw(st.integers(0, 255))
    return array(old), array(bytes(new))


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(pair=pairs())
def test_a_change_brings_the_old_bytes_to_the_new_ones(encoding: Encoding, pair) -> None:
    old, new = pair
    change = encode(old, new, encoding)
    assert (change is None) == (old.tobytes() == new.tobytes())
    if change is not None:
        assert change.num_changed == sum(a != b for a, b in zip(old, new, strict=True))
        assert decode(change.data, old, encoding).tobytes() == new.tobytes()


@given(pair=pairs())
def test_overwriting_twice_does_the_same_as_once(pair) -> None:
    old, new = pair
    change = encode(old, new, "overwrite")
    if change is not None:
        assert decode(change.data, new, "overwrite").tobytes() == new.tobytes()


def test_xor_by_hand() -> None:
    change = encode(array(b"\x01\x02\xff"), array(b"\x01\x03\x0f"), "xor")
    assert change is not None
    assert zstandard.decompress(change.data) == b"\x00\x01\xf0"


def test_overwrite_by_hand() -> None:
    change = encode(array(b"\x01\x02\xff"), array(b"\x01\x03\x0f"), "overwrite")
    assert change is not None
    assert zstandard.decompress(change.data) == b"\x60\x03\x0f"  # places 0 1 1, then the values


def test_few_changes_are_small() -> None:
    old = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    new = old.copy()
    new[::1000] ^= 1
    for encoding in ENCODINGS:
        change = encode(old, new, encoding)
        assert change is not None
        assert change.num_changed == 100
        assert len(change.data) < 1000


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_damaged_or_of_another_tensor_is_refused(encoding: Encoding) -> None:
    old, new = array(bytes(range(40))), array(bytes(reversed(range(40))))
    change = encode(old, new, encoding)
    assert change is not None
    with pytest.raises(CheckpointError, match="cannot be read"):
        decode(b"no zstd at all", old, encoding)
    for other in (old[:30], np.concatenate([old, old, old])):
        with pytest.raises(CheckpointError, match="the change"):
            decode(change.data, other, encoding)


def test_checksums_are_those_of_their_libraries() -> None:
    data = array(b"weights of a tensor")
    assert checksum_of(data, "xxh3-128") == xxhash.xxh3_128(data.tobytes()).hexdigest()
    assert checksum_of(data, "blake3") == blake3.blake3(data.tobytes()).hexdigest()
    assert checksum_of(data, "adler32") == f"{zlib.adler32(data.tobytes()):08x}"
