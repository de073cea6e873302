"""json_array(): the objects of a huge JSON array, one after the other, in bounded memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slime.errors import DataError

_CHUNK_CHARS = 2**20
# An object that is longer is taken for a damaged file, which would otherwise be read to its end.
_MAX_CHARS = 64 * 2**20


def json_array(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file[12]`, object) for each element of the array that is the file.

    Memory stays at a few times the longest object.

    Raises:
        DataError: the file is no array of objects, ends early, or is no UTF-8.
    """
    reader = _Reader(file)
    reader.expect("[")
    index = 0
    while reader.peek() != "]":
        if index:
            reader.expect(",")
        yield f"{file}[{index}]", reader.read_object(index)
        index += 1
    reader.expect("]")
    if reader.peek():
        raise reader.damaged(f"there is more behind its end, {reader.peek()!r}")


class _Reader:
    """The text of a file behind a position, as much of it as is needed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._chunks = self._read()
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._position = 0

    def peek(self) -> str:
        """The next character that is no space; nothing at the end."""
        while True:
            while self._position < len(self._text) and self._text[self._position].isspace():
                self._position += 1
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        """Step over that character.

        Raises:
            DataError: another one stands there.
        """
        if (found := self.peek()) != character:
            raise self.damaged(f"expected {character!r}, found {found or 'its end'!r}")
        self._position += 1

    def read_object(self, index: int) -> dict[str, Any]:
        """The object at the position.

        Raises:
            DataError: there is none, or it does not end.
        """
        if (found := self.peek()) != "{":
            raise self.damaged(f"element {index} should be an object, found {found or 'its end'!r}")
        while True:
            try:
                value, self._position = self._decoder.raw_decode(self._text, self._position)
                return value
            except (ValueError, RecursionError) as error:
                # Mostly the rest is not read yet. Twice as much each time keeps the work linear.
                size = len(self._text) - self._position
                if size > _MAX_CHARS or isinstance(error, RecursionError):
                    raise self.damaged(f"element {index} is damaged: {error}") from error
                if not self._more(size):
                    raise self.damaged(
                        f"it ends within element {index}, or that is damaged: {error}"
                    ) from error

    def damaged(self, what: str) -> DataError:
        return DataError(f"{self._file}: no whole JSON array of objects: {what}; download it again")

    def _more(self, size: int = 0) -> bool:
        """Whether there was more text; about `size` characters of it are added, and what is done dropped."""
        parts = [self._text[self._position :]]
        while size >= 0 and (chunk := next(self._chunks, "")):
            parts.append(chunk)
            size -= len(chunk)
        self._text, self._position = "".join(parts), 0
        return len(parts) > 1

    def _read(self) -> Iterator[str]:
        try:
            with self._file.open(encoding="utf-8-sig") as text:
                while chunk := text.read(_CHUNK_CHARS):
                    yield chunk
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {self._file}: {error}; is the file whole?") from error
