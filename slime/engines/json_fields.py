"""Fields: typed reading of a JSON object, with errors that name the field and what was found."""

import difflib
import math
from collections.abc import Iterable
from typing import Any, cast

from slime.errors import EngineProtocolError


class Fields:
    """A JSON object whose fields are read by type; null and absent both mean the default.

    Args:
        raw: the decoded JSON.
        where: name of the object, for messages; empty for the top level.

    Raises:
        EngineProtocolError: `raw` is no object. All readers raise it as well.
    """

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise EngineProtocolError(
                f"{where or 'the body'} must be a JSON object, got {raw!r:.80}"
            )
        self.raw = cast(dict[str, Any], raw)
        self._where = where

    def refuse(self, names: Iterable[str], advice: str) -> None:
        """Stop at fields of these names unless they are null, false, zero or empty."""
        for name in names:
            if self.raw.get(name):
                raise EngineProtocolError(f"{self._name(name)} = {self.raw[name]!r:.80}: {advice}")

    def refuse_unknown(self, known: frozenset[str]) -> None:
        """Stop at a field of another name that carries a value."""
        for name, value in self.raw.items():
            if name not in known and value is not None:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise EngineProtocolError(f"{self._name(name)} is unknown{hint}")

    def integer(
        self, name: str, default: int | None, *, low: int | None = None, high: int | None = None
    ) -> int:
        """A whole number in [low, high]; required when the default is None."""
        value = self.opt_int(name, default, low=low, high=high)
        return self._required(name, value)

    def opt_int(
        self, name: str, default: int | None, *, low: int | None = None, high: int | None = None
    ) -> int | None:
        """A whole number in [low, high], or the default."""
        value = self.raw.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int:
            raise self._wrong(name, "a whole number")
        if (low is not None and value < low) or (high is not None and value > high):
            raise self._wrong(name, f"a whole number {_range(low, high)}")
        return value

    def number(
        self,
        name: str,
        default: float | None,
        *,
        low: float,
        high: float | None = None,
        low_is_open: bool = False,
    ) -> float:
        """A finite number in [low, high], or (low, high] when `low_is_open`."""
        value = self.raw.get(name)
        if value is None:
            return self._required(name, default)
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not is_number or value < low or (low_is_open and value == low):
            raise self._wrong(name, f"a number {_range(low, high, low_is_open)}")
        if high is not None and value > high:
            raise self._wrong(name, f"a number {_range(low, high, low_is_open)}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.raw.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self._wrong(name, "true or false")
        return value

    def string(self, name: str, default: str | None) -> str:
        """A text; required when the default is None."""
        value = self.raw.get(name)
        if value is None:
            return self._required(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        """A text or a list of texts; empty when absent."""
        value = self.raw.get(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(
            isinstance(item, str) for item in cast(list[object], values)
        ):
            raise self._wrong(name, "a string or a list of strings")
        return tuple(cast(list[str], values))

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers; empty when absent."""
        value = self.raw.get(name)
        if value is None:
            return ()
        items = cast(list[Any], value) if isinstance(value, list) else [value]
        if not all(type(item) is int for item in items):
            raise self._wrong(name, "a list of whole numbers")
        return tuple(items)

    def opt_object(self, name: str) -> dict[str, Any] | None:
        """A JSON object, or None."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return cast("dict[str, Any] | None", value)

    def _name(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def _wrong(self, name: str, expected: str) -> EngineProtocolError:
        return EngineProtocolError(
            f"{self._name(name)} must be {expected}, got {self.raw[name]!r:.80}"
        )

    def _required[T](self, name: str, value: T | None) -> T:
        if value is None:
            raise EngineProtocolError(f"{self._name(name)} is missing")
        return value


def _range(low: float | None, high: float | None, low_is_open: bool = False) -> str:
    if high is None:
        return f"{'>' if low_is_open else '>='} {low}"
    return f"in {'(' if low_is_open else '['}{low}, {high}]"
