"""Trackers: where metrics go. `Trackers` hands each call to all of them."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from slime.errors import SlimeError
from slime.observability.disk import write_failure

_BLOCK_BYTES = 1 << 16

logger = logging.getLogger(__name__)

StepKey = Literal["rollout/step", "train/step", "eval/step"]
STEP_KEYS: tuple[StepKey, ...] = get_args(StepKey)
MAX_FAILURES = 5


class Tracker(Protocol):
    """One place that keeps metrics."""

    def log(self, metrics: Mapping[str, float], *, step_key: StepKey, step: int) -> None:
        """Keep `metrics` as the values at `step` of the axis `step_key`."""
        ...

    def close(self) -> None:
        """Write what is still held back."""
        ...


class JsonlTracker:
    """One JSON object per call: `{"time": ..., "rollout/step": 3, "rollout/raw_reward": 0.4}`.

    `time` is in seconds since 1970. Every line is flushed: a killed run loses its last at most. A
    line that an earlier run left half-written is cut off, so that the next does not join it.

    Raises:
        SlimeError: the disk is full, or the file cannot be written for another reason.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            _drop_cut_line(path)
            # Without a buffer: what did not fit on the disk must not come once more at the end.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise SlimeError(write_failure(path, error)) from error

    def log(self, metrics: Mapping[str, float], *, step_key: StepKey, step: int) -> None:
        row: dict[str, Any] = {"time": round(time.time(), 3), step_key: step}
        row |= {name: _json_number(value) for name, value in metrics.items()}
        line, begin = json.dumps(row, allow_nan=False).encode() + b"\n", self._file.tell()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(begin)
            raise SlimeError(write_failure(self._path, error)) from error

    def close(self) -> None:
        self._file.close()


class TensorBoardTracker:
    """TensorBoard event files, by the `tensorboard` package alone: no torch in this process.

    Args:
        folder: of the event files.
        earlier: rows of metrics.jsonl that count. When the folder has event files of an earlier
            start, TensorBoard is told to forget them all, and these rows are written again: rounds
            that a resume does once more must not show twice. (Its own way, to purge from a step on,
            knows one axis for all; ours are three.)
    """

    def __init__(self, folder: Path, earlier: Iterable[Mapping[str, float]] = ()) -> None:
        is_used = any(folder.glob("*tfevents*"))
        # Half a second of imports, paid only by a run that wants event files. None has types.
        proto = "tensorboard.compat.proto"
        writer: Any = import_module("tensorboard.summary.writer.event_file_writer")
        self._event: Any = import_module(f"{proto}.event_pb2").Event
        self._summary: Any = import_module(f"{proto}.summary_pb2").Summary
        self._writer: Any = writer.EventFileWriter(str(folder))
        if is_used:
            log: Any = import_module(f"{proto}.event_pb2").SessionLog
            start = log(status=log.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=0, session_log=start))
            for row in earlier:
                self._replay(row)
            self._writer.flush()

    def log(self, metrics: Mapping[str, float], *, step_key: StepKey, step: int) -> None:
        del step_key  # the axis shows in the names: TensorBoard has one step per tag
        self._add(metrics, step, time.time())
        self._writer.flush()

    def _replay(self, row: Mapping[str, float]) -> None:
        """Write a row of metrics.jsonl, at the time it was logged at."""
        step_key = next((key for key in STEP_KEYS if key in row), None)
        if step_key is not None:
            metrics = {name: row[name] for name in row if name not in ("time", step_key)}
            self._add(metrics, int(row[step_key]), row.get("time", time.time()))

    def _add(self, metrics: Mapping[str, float], step: int, wall_time: float) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in metrics.items()
        ]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=wall_time, step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


class Guarded:
    """A tracker whose failures cost a warning, not the run: metrics.jsonl has everything anyway.

    After MAX_FAILURES failures in a row it is left out: a service that is down may take long to say
    so at every call.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name = name
        self._tracker = tracker
        self._failures = 0
        self._warned = False

    def log(self, metrics: Mapping[str, float], *, step_key: StepKey, step: int) -> None:
        if self._failures >= MAX_FAILURES:
            return
        try:
            self._tracker.log(metrics, step_key=step_key, step=step)
            self._failures = 0
        except Exception as error:  # noqa: BLE001 - a fence around somebody else's service
            self._failures += 1
            self._warn("does not take metrics", error)

    def close(self) -> None:
        try:
            self._tracker.close()
        except Exception as error:  # noqa: BLE001 - as above
            self._warn("could not be closed", error)

    def _warn(self, what: str, error: Exception) -> None:
        if self._warned:
            logger.debug("%s %s", self._name, what, exc_info=error)
            return
        self._warned = True
        logger.warning(
            "%s %s (%r); the run goes on, metrics.jsonl stays complete, and this is said once",
            self._name,
            what,
            error,
        )


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, metrics: Mapping[str, float], *, step_key: StepKey, step: int) -> None:
        for tracker in self._trackers:
            tracker.log(metrics, step_key=step_key, step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`, oldest first; a last line cut by a crash is left out."""
    rows: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append({name: float(value) for name, value in json.loads(line).items()})
    return rows


def tensorboard_folder(default: Path, project: str | None, experiment: str | None) -> Path:
    """Where event files go: `TENSORBOARD_DIR`, else `default`; a folder for each name given."""
    base = Path(os.environ.get("TENSORBOARD_DIR") or default)
    return base.joinpath(*(part for part in (project, experiment) if part))


def _drop_cut_line(path: Path) -> None:
    """Cut what stands behind the last line break."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            if (found := file.read(end - start).rfind(b"\n")) >= 0:
                end = start + found + 1
                break
            end = start
        file.truncate(end)


def _json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as strings that `float()` reads back."""
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
