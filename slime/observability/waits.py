"""Who waits for whom since when, in this process: a table that one thread watches.

Example:
    with waiting("http://127.0.0.1:4000", "answer POST /generate", deadline_s=1800.0):
        ...

A wait that is late is told in one line of the log, with those alike summed up: `waiting 61 s for
http://127.0.0.1:4000 to answer POST /generate (512 such waits, the oldest for sample 17, deadline
1800 s)`. Other processes read the same in `RUN/doctor/waits-{role}.json`.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

TICK_S = 1.0
# A wait without its own warning time is late after this part of its deadline, a minute at most.
WARN_FRACTION = 0.25
WARN_AFTER_S = 60.0
# Younger waits are everyday work; older ones are worth a file that other processes can read.
NOTED_AFTER_S = 10.0
# Each warning about the same waits comes this many times later than the one before.
WARN_GROWTH = 2.0

_subject: ContextVar[str | None] = ContextVar("slime_wait_subject", default=None)


class waiting:
    """A `with` block that is noted as a wait; entering and leaving take microseconds.

    A class with a function's name: a generator would take three times as long.

    Args:
        on: who is waited for: `rollout manager`, `http://127.0.0.1:4000`; may be changed inside.
        what: what they are to do (`generate rollout 3`); waits alike in both are summed up.
        deadline_s: when the caller will give up, seconds; only told.
        warn_after_s: when the wait is late; by default a quarter of the deadline, at most a minute.
    """

    __slots__ = ("deadline_s", "on", "started", "subject", "warn_after_s", "what")

    def __init__(
        self,
        on: str,
        what: str,
        *,
        deadline_s: float | None = None,
        warn_after_s: float | None = None,
    ) -> None:
        self.on = on
        self.what = what
        self.deadline_s = deadline_s
        if warn_after_s is None:
            warn_after_s = min(WARN_AFTER_S, WARN_FRACTION * (deadline_s or WARN_AFTER_S * 4))
        self.warn_after_s = warn_after_s

    def __enter__(self) -> Self:
        self.subject = _subject.get()
        self.started = time.monotonic()
        _table[id(self)] = self
        if _watch is None:
            _start_watch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _table.pop(id(self), None)


class subject:
    """Waits inside the block, those of tasks started there included, are about `name`: `sample 17`."""

    __slots__ = ("name", "token")

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.token = _subject.set(self.name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _subject.reset(self.token)


@dataclass(frozen=True, kw_only=True)
class WaitRow:
    """Waits alike: the same party, the same call.

    Attributes:
        count: how many there are.
        waited_s: of the oldest one, seconds.
        deadline_s: of the oldest one; None when it has none.
        oldest: whom the oldest one is about (`sample 17`); empty when nobody said.
        late: whether one is past its warning time.
        sentence: told instead of the usual words.
    """

    on: str
    what: str
    count: int = 1
    waited_s: float = 0.0
    deadline_s: float | None = None
    oldest: str = ""
    late: bool = False
    sentence: str = ""

    def __str__(self) -> str:
        if self.sentence:
            return self.sentence
        notes = [f"{self.count} such waits"] if self.count > 1 else []
        if self.oldest:
            notes.append(f"{'the oldest ' if self.count > 1 else ''}for {self.oldest}")
        if self.deadline_s is not None:
            notes.append(f"deadline {self.deadline_s:.0f} s")
        noted = f" ({', '.join(notes)})" if notes else ""
        return f"waiting {self.waited_s:.0f} s for {self.on} to {self.what}{noted}"


def current_waits() -> list[WaitRow]:
    """The waits of this process, summed up, the oldest first."""
    now = time.monotonic()
    alike: dict[tuple[str, str], list[waiting]] = {}
    for wait in list(_table.values()):  # other threads change the table meanwhile
        alike.setdefault((wait.on, wait.what), []).append(wait)
    rows = [_row(waits, now) for waits in alike.values()]
    rows += [row for check in list(_checks) if (row := check(now)) is not None]
    return sorted(rows, key=lambda row: -row.waited_s)


def report_to(role: str, folder: Path) -> None:
    """Write the waits of this process to `folder/waits-{role}.json` while some are old.

    The file is replaced whole, about each second, and removed when no old wait is left.
    """
    global _report
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _report = _Report(role, folder / f"waits-{file_name(role)}.json")


def add_check(check: Callable[[float], WaitRow | None]) -> None:
    """Ask `check(time.monotonic())` about each second for a wait that nobody could note itself."""
    _checks.append(check)
    if _watch is None:
        _start_watch()


def remove_check(check: Callable[[float], WaitRow | None]) -> None:
    """Ask `check` no more."""
    if check in _checks:
        _checks.remove(check)


def file_name(role: str) -> str:
    """`role` as a part of a file's name: `train rank 0` is `train-rank-0`."""
    return "".join(char if char.isalnum() or char in "._-" else "-" for char in role)


def _row(waits: list[waiting], now: float) -> WaitRow:
    oldest = min(waits, key=lambda wait: wait.started)
    return WaitRow(
        on=oldest.on,
        what=oldest.what,
        count=len(waits),
        waited_s=round(now - oldest.started, 3),
        deadline_s=oldest.deadline_s,
        oldest=oldest.subject or "",
        late=any(now - wait.started >= wait.warn_after_s for wait in waits),
    )


@dataclass
class _Report:
    """The file another process reads."""

    role: str
    path: Path
    written: bool = field(default=False)

    def write(self, rows: list[WaitRow]) -> None:
        if not rows:
            if self.written:
                self.path.unlink(missing_ok=True)
                self.written = False
            return
        content: dict[str, Any] = {"role": self.role, "pid": os.getpid(), "time": time.time()}
        content["waits"] = [asdict(row) for row in rows]
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(self.path)  # a reader never sees half a table
        self.written = True


class _Watch(threading.Thread):
    """Looks at the table about each second, warns of late waits and keeps the report current."""

    def __init__(self) -> None:
        super().__init__(name="slime-waits", daemon=True)
        # (on, what) -> age at which the next warning about such waits is due.
        self._due: dict[tuple[str, str], float] = {}

    def run(self) -> None:
        while True:
            time.sleep(TICK_S)
            rows = current_waits()
            self._warn(rows)
            if _report is not None:
                old = [row for row in rows if row.late or row.waited_s >= NOTED_AFTER_S]
                try:
                    _report.write(old)
                except OSError as error:  # a full disk must not end the watch
                    logger.warning("cannot write %s: %s", _report.path, error)

    def _warn(self, rows: Iterable[WaitRow]) -> None:
        late = {(row.on, row.what): row for row in rows if row.late}
        for key in [key for key in self._due if key not in late]:
            del self._due[key]
        for key, row in late.items():
            if row.waited_s >= self._due.get(key, 0.0):
                self._due[key] = WARN_GROWTH * row.waited_s
                logger.warning("%s", row)


_table: dict[int, waiting] = {}
_checks: list[Callable[[float], WaitRow | None]] = []
_report: _Report | None = None
_watch: _Watch | None = None
_lock = threading.Lock()


def _start_watch() -> None:
    global _watch
    with _lock:
        if _watch is None:
            _watch = _Watch()
            _watch.start()


def _forget() -> None:
    """A forked child has neither our threads nor our waits, and must not write our file."""
    global _watch, _report, _lock
    _watch, _report, _lock = None, None, threading.Lock()
    _table.clear()
    _checks.clear()


os.register_at_fork(after_in_child=_forget)
