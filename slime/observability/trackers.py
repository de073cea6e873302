"""Trackers: where metrics go. `Trackers` hands each call to all of them."""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

StepKey = Literal["rollout/step", "train/step", "eval/step"]


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

    `time` is in seconds since 1970. Every line is flushed: a killed run loses its last at most.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def log(self, metrics: Mapping[str, float], *, step_key: StepKey, step: int) -> None:
        row: dict[str, Any] = {"time": round(time.time(), 3), step_key: step}
        row |= {name: _json_number(value) for name, value in metrics.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardTracker:
    """TensorBoard event files, by the `tensorboard` package alone: no torch in this process."""

    def __init__(self, folder: Path) -> None:
        # Half a second of imports, paid only by a run that wants event files. None has types.
        proto = "tensorboard.compat.proto"
        writer: Any = import_module("tensorboard.summary.writer.event_file_writer")
        self._event: Any = import_module(f"{proto}.event_pb2").Event
        self._summary: Any = import_module(f"{proto}.summary_pb2").Summary
        self._writer: Any = writer.EventFileWriter(str(folder))

    def log(self, metrics: Mapping[str, float], *, step_key: StepKey, step: int) -> None:
        del step_key  # the axis shows in the names: TensorBoard has one step per tag
        values = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in metrics.items()
        ]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


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


def _json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as strings that `float()` reads back."""
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
