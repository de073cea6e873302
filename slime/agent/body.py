"""A request's parameters, each taken by name; what nobody takes is refused by name."""

from collections.abc import Sequence
from typing import Any, cast

from slime.agent.asked import ApiError

_KINDS: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


class Body:
    """A JSON object of a request. A null is as good as nothing.

    Args:
        raw: decoded JSON.
        where: in front of names in messages, such as "messages[2].".

    Raises:
        ApiError: no object.
    """

    def __init__(self, raw: Any, where: str = "") -> None:
        if not isinstance(raw, dict):
            raise ApiError(
                f"{where.rstrip('.') or 'the body'} must be an object, found {raw!r:.80}"
            )
        items = cast(dict[str, Any], raw).items()
        self._left = {name: value for name, value in items if value is not None}
        self._where = where

    def take[T](self, name: str, kind: type[T], *, required: bool = False) -> T | None:
        """The value of `name`, None without one.

        Raises:
            ApiError: another kind, or none though it is required.
        """
        if name not in self._left:
            if required:
                raise self.error(name, "is missing")
            return None
        value = self._left.pop(name)
        if not isinstance(value, kind):
            raise self.error(name, f"must be {_KINDS[kind]}, found {value!r:.80}")
        return value

    def text(self, name: str) -> str:
        """A string that must be there."""
        value = self.take(name, str, required=True)
        assert value is not None
        return value

    def number(self, name: str, low: float, high: float = float("inf")) -> float | None:
        """A number in [low, high]."""
        value = self._left.pop(name, None)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise self.error(name, f"must be a number in [{low:g}, {high:g}], found {value!r:.80}")
        return float(value)

    def whole(self, name: str, low: int) -> int | None:
        """A whole number of at least `low`."""
        value = self._left.pop(name, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.error(name, f"must be a whole number of at least {low}, found {value!r:.80}")
        return value

    def any(self, name: str) -> Any:
        """The value, of any kind."""
        return self._left.pop(name, None)

    def texts(self, name: str) -> tuple[str, ...]:
        """A string or a list of strings; empty ones are left out."""
        value = self._left.pop(name, None)
        values: list[Any] = [value] if isinstance(value, str) else value or []
        if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
            raise self.error(name, f"must be a string or a list of strings, found {value!r:.80}")
        return tuple(filter(None, values))

    def ignore(self, *names: str) -> None:
        """Drop what changes no answer."""
        for name in names:
            self._left.pop(name, None)

    def only(self, name: str, allowed: Sequence[Any], why: str) -> Any:
        """The value, which must be one of `allowed`; for parameters of which a part is built."""
        value = self._left.pop(name, None)
        # 1 == True, but n = true is another request than n = 1.
        if value is not None and not any(
            value == one and type(value) is type(one) for one in allowed
        ):
            shown = " or ".join(repr(one) for one in allowed) or "nothing"
            raise self.error(name, f"{value!r:.80} is not supported ({why}); it may be {shown}")
        return value

    def done(self) -> None:
        """Nothing, when every parameter was taken.

        Raises:
            ApiError: naming the first that was not.
        """
        for name, value in self._left.items():
            raise self.error(name, f"is not supported by this endpoint, found {value!r:.80}")

    def error(self, name: str, what: str) -> ApiError:
        """The parameter `name` is wrong."""
        full = f"{self._where}{name}"
        return ApiError(f"{full}: {what}", param=full, code="unsupported_parameter")


def joined_text(content: Any, where: str, kinds: Sequence[str] = ("text",)) -> str:
    """The text of a message's content: a string, or a list of parts that hold text.

    Raises:
        ApiError: a part of another kind, such as an image.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(
            f"{where}: must be text or a list of parts, found {content!r:.80}", param=where
        )
    texts: list[str] = []
    for part in cast(list[Any], content):
        kind: Any = cast(Any, part).get("type") if isinstance(part, dict) else None
        text: Any = cast(Any, part).get("text") if isinstance(part, dict) else None
        if kind not in kinds or not isinstance(text, str):
            raise ApiError(
                f"{where}: a part of type {kind!r} is not supported, only {' and '.join(kinds)}",
                param=where,
                code="unsupported_content",
            )
        texts.append(text)
    return "\n".join(texts)
