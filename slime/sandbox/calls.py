"""Calls between two sandboxed processes: one has the model's code, the other the tests.

Tests next to the code they judge could be cheated: code can leave before they run, return objects
that equal everything, or replace what they call. Here only plain data cross: what comes back is made
anew from JSON as None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict,
Fraction or Decimal. Anything else stays where it is, and the tests hold a `RemoteObject` for it.
"""

import builtins
import importlib
import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, BinaryIO

_SEQUENCES: dict[str, type[Any]] = {"l": list, "t": tuple, "s": set, "z": frozenset}
_NUMBERS: dict[str, type[Any]] = {"fraction": Fraction, "decimal": Decimal}
_PLAIN: tuple[type[Any], ...] = (bool, int, float, str)
# Never raised here because the code did: an assertion is the tests' own, and the other two end a loop of
# the tests (`all(map(is_right, cases))`) as if all of it had passed.
_NOT_RAISED = (AssertionError, StopIteration, StopAsyncIteration)


class RemoteError(Exception):
    """The other side raised something that is no built-in exception, or one of `_NOT_RAISED`."""


class RemoteObject:
    """An object of the other side; it can be called, iterated, indexed and asked for attributes.

    It never equals another and has no order: only plain data can be compared.
    """

    def __init__(self, tester: "Tester", key: int) -> None:
        self._tester = tester
        self._key = key

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tester.ask("call", self._key, list(args), kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._tester.ask("attribute", self._key, name)

    def __getitem__(self, key: Any) -> Any:
        return self._tester.ask("item", self._key, key)

    def __len__(self) -> int:
        return self._tester.ask("len", self._key)

    def __bool__(self) -> bool:
        return self._tester.ask("bool", self._key) is True

    def __iter__(self) -> Iterator[Any]:
        items = self._tester.ask("iter", self._key)
        while True:
            item = self._tester.ask("next", items._key)
            if not isinstance(item, list) or not item:
                return
            yield item[0]

    def __next__(self) -> Any:
        item = self._tester.ask("next", self._key)
        if not isinstance(item, list) or not item:
            raise StopIteration
        return item[0]


def encode(value: Any, keep: Callable[[Any], Any]) -> Any:
    """`value` as JSON data; `keep` says what stands for an object that is none.

    Subclasses of plain types travel as these.
    """
    if value is None or type(value) in _PLAIN:
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), keep)
    for kind in _PLAIN:
        if isinstance(value, kind):
            return kind(value)
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {tag: [encode(item, keep) for item in value]}
    if isinstance(value, dict):
        return {"d": [[encode(k, keep), encode(v, keep)] for k, v in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"b": value.decode("latin-1")}
    if isinstance(value, complex):
        return {"c": [value.real, value.imag]}
    for tag, kind in _NUMBERS.items():
        if isinstance(value, kind):
            return {tag: str(value)}
    return keep(value)


def decode(data: Any, held: Callable[[int], Any]) -> Any:
    """The value that `encode` made `data` of; `held` gives an object for its key.

    Raises:
        ValueError: no such data.
    """
    if not isinstance(data, dict):
        if isinstance(data, list):
            raise ValueError("a list without its tag")
        return data
    if len(data) != 1:
        raise ValueError(f"{len(data)} tags instead of one")
    ((tag, content),) = data.items()
    if tag in _SEQUENCES:
        return _SEQUENCES[tag]([decode(item, held) for item in content])
    if tag == "d":
        return {decode(key, held): decode(value, held) for key, value in content}
    if tag == "b":
        return content.encode("latin-1")
    if tag == "c":
        return complex(*content)
    if tag in _NUMBERS:
        return _NUMBERS[tag](content)
    if tag == "o":
        return held(int(content))
    raise ValueError(f"unknown tag {tag!r:.20}")


def serve(namespace: dict[str, Any], stream: BinaryIO) -> None:
    """Answer calls into `namespace` until the other side closes."""
    objects: dict[int, Any] = {}
    numbers = itertools.count()

    def keep(value: Any) -> Any:
        key = next(numbers)
        objects[key] = value
        return {"o": key}

    for line in stream:
        operation, *data = json.loads(line)
        try:
            arguments = [decode(item, objects.__getitem__) for item in data]
            reply = {"value": encode(_perform(namespace, objects, operation, arguments), keep)}
            text = json.dumps(reply)
        except BaseException as error:  # noqa: BLE001 - the tests may expect just that
            text = json.dumps({"error": [type(error).__name__, str(error)[:1000]]})
        stream.write(text.encode() + b"\n")
        stream.flush()


def _perform(
    namespace: dict[str, Any], objects: dict[int, Any], operation: str, arguments: list[Any]
) -> Any:
    if operation == "names":
        return [name for name in namespace if not name.startswith("__")]
    if operation == "global":
        return namespace[arguments[0]]
    target = objects[arguments[0]]
    match operation:
        case "call":
            return target(*arguments[1], **arguments[2])
        case "attribute":
            return getattr(target, arguments[1])
        case "item":
            return target[arguments[1]]
        case "iter":
            return _Iterator(iter(target))
        case "next":
            return list(itertools.islice(target, 1))
        case "len":
            return len(target)
        case _:
            return bool(target)


class _Iterator:
    """An iterator that stays here, whatever it yields."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return self._items


class Tester:
    """The side of the tests."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def names(self) -> dict[str, Any]:
        """What the tests may use: the names of the other side's code.

        Built-ins are never among them, and modules of the standard library are this side's own: code
        that defines `all` or `math` changes nothing here. Nor are names like `__builtins__`, from
        which Python itself would take them; the other side may have been told to send those.
        """
        found: dict[str, Any] = {}
        for name in self.ask("names"):
            if not isinstance(name, str) or name.startswith("__") or hasattr(builtins, name):
                continue
            if name in sys.stdlib_module_names:
                found[name] = importlib.import_module(name)
            else:
                found[name] = self.ask("global", name)
        return found

    def ask(self, operation: str, *arguments: Any) -> Any:
        """The answer of the other side.

        Raises:
            Exception: the built-in one that was raised there, or RemoteError.
            ConnectionError: that process has ended.
        """
        request = [operation, *(encode(item, self._refuse) for item in arguments)]
        self._stream.write(json.dumps(request).encode() + b"\n")
        self._stream.flush()
        line = self._stream.readline()
        if not line:
            raise ConnectionError("the process with the code has ended")
        reply: Mapping[str, Any] = json.loads(line)
        if "error" in reply:
            raise _built_in_error(*reply["error"])
        return decode(reply["value"], lambda key: RemoteObject(self, key))

    def _refuse(self, value: Any) -> Any:
        if isinstance(value, RemoteObject):
            return {"o": value._key}
        if isinstance(value, types.FunctionType):
            raise TypeError("a function cannot be handed to the code under test")
        raise TypeError(f"{type(value).__name__} cannot be handed to the code under test")


def _built_in_error(name: str, message: str) -> Exception:
    kind = getattr(builtins, str(name), None)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind not in _NOT_RAISED:
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError and its like want more
            pass
    return RemoteError(f"{name}: {message}")
