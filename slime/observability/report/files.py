"""Files of a run folder, read as they are found: missing, cut by a kill, or still being written."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from slime.observability.trackers import read_metrics

Row = dict[str, Any]


@dataclass
class Notes:
    """What the report has to say about its own gaps, one sentence each."""

    lines: list[str] = field(default_factory=list[str])

    def add(self, line: str) -> None:
        """One more gap; the same one is told once."""
        if line not in self.lines:
            self.lines.append(line)


def read_text(path: Path, notes: Notes, *, missing: str) -> str | None:
    """The text of a file; None, and a note, when there is none or it cannot be read.

    Args:
        missing: what the page goes without, for the note: `no curves`.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        notes.add(f"There is no {path.name}: {missing}.")
    except OSError as error:
        notes.add(f"{path.name} cannot be read ({error.strerror}): {missing}.")
    return None


def read_object(path: Path, notes: Notes, *, missing: str) -> Row:
    """One JSON object; empty, and a note, when it is missing or damaged."""
    text = read_text(path, notes, missing=missing)
    if text is None:
        return {}
    value = _parsed(text)
    if value is None:
        notes.add(f"{path.name} is damaged: {missing}.")
    return value or {}


def read_rows(path: Path, notes: Notes, *, missing: str) -> list[Row]:
    """The objects of a JSON-lines file, oldest first; damaged lines are counted in a note.

    Half a last line is no damage: the run may be writing it now, or was killed at it.
    """
    text = read_text(path, notes, missing=missing)
    if text is None:
        return []
    lines = text.split("\n")  # not splitlines: U+2028 may stand inside a JSON string
    rows = [_parsed(line) for line in lines[:-1] if line.strip()]
    kept = [row for row in rows if row is not None]
    if len(kept) < len(rows):
        notes.add(f"{path.name}: {len(rows) - len(kept)} damaged lines are left out.")
    last = _parsed(lines[-1])
    return kept if last is None else [*kept, last]


def read_metric_rows(path: Path, notes: Notes) -> list[dict[str, float]]:
    """Rows of metrics.jsonl; a damaged line costs itself only."""
    try:
        return read_metrics(path)
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # told in a note below: line by line what is whole can still be had
    rows = read_rows(path, notes, missing="no curves and no table of metrics")
    return [
        {name: number for name, value in row.items() if (number := as_number(value)) is not None}
        for row in rows
    ]


def as_number(value: object) -> float | None:
    """A number, or text of one such as "NaN"; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def as_round(value: object) -> int | None:
    """A whole number that can be a round; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def as_list(value: object) -> list[Any]:
    """A list as it is; empty for anything else."""
    return cast(list[Any], value) if isinstance(value, list) else []


def plain_text(value: object) -> str:
    """A value for people: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _parsed(text: str) -> Row | None:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast(Row, value) if isinstance(value, dict) else None
