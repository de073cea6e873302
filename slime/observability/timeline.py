"""Timeline: what this process did when, as spans in RUN/timeline/{role}.jsonl.

Each process writes its own file, so a round of all roles can be drawn side by side. A process that
has not called `open_timeline` writes nothing. Measured: a span costs 3 microseconds, written 18.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = "timeline"
_FLUSH_AFTER_S = 1.0

# The round that encloses what runs now, in this thread or task: inner spans take it over.
_round: ContextVar[int | None] = ContextVar("slime_timeline_round", default=None)


class Timeline:
    """The spans of one process, appended to a file about once a second. Threads may share it.

    What is not flushed when the process is killed is lost; a full disk ends the file with a
    warning, not the run.

    Args:
        path: made with its folder; a file of an earlier run in this folder is continued.
        role: `driver`, `rollout manager`, `train rank 0`.
    """

    def __init__(self, path: Path, role: str) -> None:
        self._role = role
        self._lines: list[str] = []
        self._lock = threading.Lock()
        self._is_broken = False
        self._flushed = time.monotonic()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Unbuffered: lines are gathered here, and a full disk shows at once, not when closing.
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed by close()
        if self._file.tell():  # a killed run may have left half a line: do not glue ours to it
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def add(self, name: str, start: float, end: float, rollout_id: int | None = None) -> None:
        """Keep one span; `start` and `end` in unix seconds."""
        row: dict[str, str | float] = {
            "role": self._role,
            "name": name,
            "start": round(start, 4),
            "end": round(end, 4),
        }
        if rollout_id is not None:
            row["rollout_id"] = rollout_id
        with self._lock:
            self._lines.append(json.dumps(row) + "\n")
            is_due = time.monotonic() - self._flushed >= _FLUSH_AFTER_S
        if is_due:
            self.flush()

    def flush(self) -> None:
        """Write what is held back."""
        with self._lock:
            self._flushed = time.monotonic()
            text, self._lines = "".join(self._lines), []
            if not text or self._is_broken:
                return
            try:
                self._file.write(text.encode())
            except OSError as error:
                self._is_broken = True
                logger.warning("the timeline ends here: %s cannot be written", error)

    def close(self) -> None:
        """Write what is held back and close the file."""
        self.flush()
        self._file.close()


_process_timeline: Timeline | None = None


def open_timeline(role: str, run_dir: Path) -> None:
    """From now on the spans of this process go to `run_dir/timeline/{role}.jsonl`."""
    global _process_timeline
    close_timeline()
    path = run_dir / FOLDER / f"{role.replace(' ', '-')}.jsonl"
    _process_timeline = Timeline(path, role)


def flush_timeline() -> None:
    """Write what this process holds back, at the end of a round say."""
    if _process_timeline is not None:
        _process_timeline.flush()


def close_timeline() -> None:
    """Write what this process holds back; later spans go nowhere."""
    global _process_timeline
    timeline, _process_timeline = _process_timeline, None
    if timeline is not None:
        timeline.close()


def add_span(name: str, start: float, end: float) -> None:
    """A span that has been timed already, in unix seconds, in the round around it."""
    if _process_timeline is not None:
        _process_timeline.add(name, start, end, _round.get())


@contextmanager
def span(name: str, rollout_id: int | None = None) -> Generator[None]:
    """A `with` block shown on the timeline, also when it raises; no metric.

    Args:
        name: of the work, the same in every round: `save`, `update_weights`.
        rollout_id: the round; spans inside the block take it over, unless they name their own.
    """
    token = None if rollout_id is None else _round.set(rollout_id)
    start = time.time()
    try:
        yield
    finally:
        add_span(name, start, time.time())
        if token is not None:
            _round.reset(token)
