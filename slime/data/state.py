"""Samples as JSON and back without loss: the state of a data source on disk, no pickle."""

import base64
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, cast

import numpy as np
import orjson

from slime.data.packed import Packed
from slime.errors import CheckpointError
from slime.observability.disk import write_failure

# A dict with this key stands for a value JSON lacks; its entry names the kind.
_KIND = "__slime__"
_MIN_INT, _MAX_INT = -(2**63), 2**63 - 1
_HALVES = "surrogatepass"
_AS_THEY_ARE = frozenset({NoneType, bool})


def encode(value: Any) -> Any:
    """`value` with everything JSON lacks (tuples, bytes, arrays, nan, odd keys) as tagged dicts.

    Lists of floats become base64 of float64: exact, and a tenth of the time.

    Raises:
        TypeError: something else is in it, such as an open file or a tensor.
    """
    kind: type[Any] = type(value)  # pyright: ignore[reportUnknownVariableType]
    if kind in _AS_THEY_ARE:
        return value
    if (encoder := _ENCODERS.get(kind)) is not None:
        return encoder(value)
    return _encode_rarer(value)


def _encode_rarer(value: Any) -> Any:
    """Kinds that samples seldom hold, and classes derived from the usual ones."""
    if isinstance(value, int):
        return _encode_int(value)
    if isinstance(value, str):
        return _encode_str(value)
    if isinstance(value, float):
        return _encode_float(value)
    if isinstance(value, list):
        return _encode_list(cast(list[Any], value))
    if isinstance(value, dict):
        return _encode_dict(cast(dict[Any, Any], value))
    if isinstance(value, tuple):
        return {_KIND: "tuple", "value": _encode_list(list(cast(tuple[Any, ...], value)))}
    if isinstance(value, bytes):
        return {_KIND: "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, np.generic):
        return encode(value.item())
    if isinstance(value, Packed):
        is_whole = value.array.dtype.kind == "i"
        return value.tolist() if is_whole else _encode_array("floats", value.array.astype(float))
    if isinstance(value, np.ndarray):
        return _encode_array("array", cast(np.ndarray[Any, Any], value))
    raise TypeError(f"{type(cast(object, value)).__name__} has no place in a JSON file")


def decode(value: Any) -> Any:
    """Inverse of `encode`."""
    if isinstance(value, list):
        return [decode(item) for item in cast(list[Any], value)]
    if not isinstance(value, dict):
        return value
    items = cast(dict[str, Any], value)
    if (kind := items.get(_KIND)) is None:
        return {key: decode(item) for key, item in items.items()}
    return _DECODERS[kind](items)


def _encode_int(value: int) -> Any:
    return value if _MIN_INT <= value <= _MAX_INT else {_KIND: "int", "value": str(value)}


def _encode_float(value: float) -> Any:
    return value if math.isfinite(value) else {_KIND: "float", "value": repr(value)}


def _encode_list(items: list[Any]) -> Any:
    if not items:
        return []
    types = set(map(type, items))
    if types == {float}:
        return _encode_array("floats", np.asarray(items, np.float64))
    if types == {int} and min(items) >= _MIN_INT and max(items) <= _MAX_INT:
        return items.copy()
    return [encode(item) for item in items]


def _encode_str(text: str) -> Any:
    if text.isascii():
        return str(text)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON escapes can smuggle in
        return {_KIND: "str", "value": base64.b64encode(text.encode("utf-8", _HALVES)).decode()}
    return str(text)


def _encode_dict(items: dict[Any, Any]) -> dict[str, Any]:
    is_plain = set(map(type, items)) <= {str} or all(isinstance(key, str) for key in items)
    if is_plain and _KIND not in items:
        # A sample is mostly None; each call costs more than the question.
        return {
            key: item if type(item) in _AS_THEY_ARE else encode(item) for key, item in items.items()
        }
    pairs = [[encode(key), encode(item)] for key, item in items.items()]
    return {_KIND: "dict", "value": pairs}


def _encode_array(kind: str, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"an array of {array.dtype} has no place in a JSON file")
    return {
        _KIND: kind,
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "value": base64.b64encode(array.tobytes()).decode(),
    }


_ENCODERS: dict[type[Any], Callable[[Any], Any]] = {
    int: _encode_int,
    str: _encode_str,
    float: _encode_float,
    list: _encode_list,
    dict: _encode_dict,
}


def _decode_array(items: dict[str, Any]) -> np.ndarray[Any, Any]:
    flat: np.ndarray[Any, Any] = np.frombuffer(
        base64.b64decode(items["value"]), dtype=np.dtype(items["dtype"])
    )
    return flat.reshape(items["shape"]).copy()  # frombuffer alone is read-only


_DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "int": lambda items: int(items["value"]),
    "str": lambda items: base64.b64decode(items["value"]).decode("utf-8", _HALVES),
    "float": lambda items: float(items["value"]),
    "tuple": lambda items: tuple(decode(items["value"])),
    "bytes": lambda items: base64.b64decode(items["value"]),
    "dict": lambda items: {decode(key): decode(item) for key, item in items["value"]},
    "floats": lambda items: _decode_array(items).tolist(),
    "array": _decode_array,
}


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write an encoded value; a reader sees the old file or the whole new one, never a part.

    Args:
        durable: wait for the disk, so that it also outlives the machine; it outlives this process
            in any case.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(orjson.dumps(value))
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        message = write_failure(path, error)
        temporary.unlink(missing_ok=True)
        raise CheckpointError(message) from error


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); resume from an earlier checkpoint with --ckpt-step"
        ) from error
