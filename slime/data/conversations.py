"""convert_conversations(): conversations as `from`/`value` turns become messages for SFT, row by row.

Such rows have OpenHermes-2.5 and other data sets in the form of ShareGPT:

    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], ...}
"""

import json
import os
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from slime.data.chat import Message, as_messages
from slime.data.dataset import read_rows
from slime.data.json_array import json_array
from slime.errors import DataError

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_UNKNOWN_ROLE = f"a role other than {', '.join(_ROLES)}"
_BATCH_ROWS = 4096


@dataclass(frozen=True)
class Converted:
    """What became of the rows.

    Attributes:
        dropped: reason -> how many rows it took, most frequent first.
        first: reason -> the first of them.
    """

    num_read: int
    num_written: int
    dropped: Mapping[str, int]
    first: Mapping[str, str]


class Dropped(Exception):
    """A row that SFT cannot use; the text says why, in the same words for all rows alike."""


def messages_of(turns: Any) -> list[Message]:
    """The turns of one conversation as messages.

    Raises:
        Dropped: they are none that an assistant's turn ends.
    """
    if not isinstance(turns, list) or not turns:
        raise Dropped("no conversation")
    messages = [_message(turn) for turn in cast(list[Any], turns)]
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise Dropped("a system turn that is not the first")
    if roles[-1] != "assistant":
        raise Dropped("not ending in an assistant turn")
    if roles[0] == "assistant" or roles[:2] == ["system", "assistant"]:
        raise Dropped("beginning with an assistant turn")
    return messages


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Dropped("a turn that is no object")
    fields = cast(dict[str, Any], turn)
    role, text = fields.get("from"), fields.get("value")
    if not isinstance(role, str) or role not in _ROLES:
        raise Dropped(_UNKNOWN_ROLE)
    if not isinstance(text, str) or not text.strip():
        raise Dropped("an empty turn")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise Dropped("text that UTF-8 cannot hold") from None
    return {"role": _ROLES[role], "content": text}


def read_conversations(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a `.json` file that is one array, of `.jsonl` or of `.parquet`.

    Raises:
        DataError: the file cannot be read.
    """
    return json_array(file) if file.suffix == ".json" else read_rows(str(file))


def convert_conversations(source: Path, target: Path) -> Converted:
    """Write `target` (.jsonl or .parquet), rows `{"messages": [...]}`, and read it back.

    Memory does not grow with the file. `target` appears when it is whole, or not at all.

    Raises:
        DataError: `target` is there already or has another suffix, the source cannot be read, no
            row is of use, or what was written reads back differently.
    """
    if target.exists():
        raise DataError(f"{target} is there already; move it away, or name another file")
    if target.suffix not in _WRITERS:
        raise DataError(f"{target}: the output is .jsonl or .parquet, found {target.suffix!r}")
    dropped, first = Counter[str](), dict[str, str]()
    num_read = num_written = 0
    with _appearing(target) as part:
        writer = _WRITERS[target.suffix](part)
        try:
            for where, row in read_conversations(source):
                num_read += 1
                try:
                    writer.add(messages_of(row.get("conversations")))
                    num_written += 1
                except Dropped as reason:
                    dropped[str(reason)] += 1
                    first.setdefault(str(reason), where)
        finally:
            writer.close()
        if not num_written:
            raise DataError(
                f"{source}: none of {num_read} rows is of use: {dict(dropped.most_common(3))}; rows "
                'look like {"conversations": [{"from": "human", "value": "..."}, ...]}'
            )
        _verify(source, part)
    return Converted(num_read, num_written, dict(dropped.most_common()), first)


def _verify(source: Path, part: Path) -> None:
    """Compare each written row with its source, read once more."""
    written = read_rows(str(part))
    for where, messages in _useful(source):
        _, row = next(written, (None, None))
        if row is None or as_messages(row["messages"], where=where) != messages:
            raise DataError(f"{part}: {where} reads back differently; is the disk full?")
    if next(written, None) is not None:
        raise DataError(f"{part} holds more than {source}; did another process write to it?")


def _useful(source: Path) -> Iterator[tuple[str, list[Message]]]:
    for where, row in read_conversations(source):
        try:
            yield where, messages_of(row.get("conversations"))
        except Dropped:
            continue


@contextmanager
def _appearing(target: Path) -> Generator[Path]:
    """A file beside `target` that gets its name at the end, or goes away."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class _JsonlWriter:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def add(self, messages: list[Message]) -> None:
        self._file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _ParquetWriter:
    def __init__(self, path: Path) -> None:
        self._arrow: Any = import_module("pyarrow")  # untyped
        parquet: Any = import_module("pyarrow.parquet")
        text = self._arrow.string()
        message = self._arrow.struct([("role", text), ("content", text)])
        self._schema = self._arrow.schema([("messages", self._arrow.list_(message))])
        self._writer = parquet.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, messages: list[Message]) -> None:
        self._rows.append({"messages": messages})
        if len(self._rows) == _BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._arrow.Table.from_pylist(self._rows, self._schema))
            self._rows = []


_WRITERS: dict[str, type[_JsonlWriter] | type[_ParquetWriter]] = {
    ".jsonl": _JsonlWriter,
    ".parquet": _ParquetWriter,
}
