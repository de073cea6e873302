"""Runs one side and watches its whole process tree; reads from its records when each step ended."""

import json
import os
import statistics
import subprocess
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime.observability.trackers import read_metrics

# Found in the environment of every process of a run, whoever its parent is by now.
MARK = "SLIME_RACE_RUN"
SAMPLE_S = 2.0
GOAL = 0.9
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Of all processes of a run at one moment."""

    time: float
    pss_bytes: int
    cpu_s: float
    num_processes: int


@dataclass(frozen=True)
class Course:
    """What happened when: seconds since 1970, and one entry per step."""

    started: float
    began: float
    ends: list[float]
    rewards: list[float]
    lengths: list[float]


class Watch:
    """Samples memory (PSS: shared pages are divided among those who share them) and CPU time."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.usages: list[Usage] = []
        self._thread.start()

    def stop(self) -> None:
        """No more samples."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            pids = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
            found = [_usage(path) for path in pids if self._is_ours(path)]
            pss, cpu = sum(f[0] for f in found), sum(f[1] for f in found)
            self.usages.append(Usage(time.time(), pss, cpu, len(found)))

    def _is_ours(self, process: Path) -> bool:
        try:
            return self._mark in (process / "environ").read_bytes().split(b"\0")
        except OSError:
            return False


def _usage(process: Path) -> tuple[int, float]:
    """(bytes, CPU seconds) of one process; zeros when it has just ended."""
    try:
        rollup = (process / "smaps_rollup").read_text()
        stat = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0.0
    pss = next((line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:")), "0")
    return int(pss) * 1024, (int(stat[11]) + int(stat[12])) / _TICKS


def run(
    command: Sequence[str], env: dict[str, str], log: Path, cwd: Path
) -> tuple[float, list[Usage]]:
    """(start time, samples) of a command that must succeed; its output goes to `log`."""
    mark = uuid.uuid4().hex
    log.parent.mkdir(parents=True, exist_ok=True)
    watch = Watch(mark)
    started = time.time()
    try:
        with log.open("w") as file:
            subprocess.run(
                command, check=True, env=env | {MARK: mark}, cwd=cwd, stdout=file, stderr=file
            )
    finally:
        watch.stop()
    return started, watch.usages


def slime_course(started: float, run_dir: Path) -> Course:
    """From metrics.jsonl: a round's row is written when the engines have the new weights."""
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if "rollout/raw_reward" in row]
    first = rows[0]
    parts = (
        "perf/rollout_time",
        "perf/rollout_data_time",
        "perf/train_time",
        "perf/update_weights_time",
    )
    return Course(
        started=started,
        began=first["time"] - sum(first[name] for name in parts),
        ends=[row["time"] for row in rows],
        rewards=[row["rollout/raw_reward"] for row in rows],
        lengths=[row["rollout/response_len/mean"] for row in rows],
    )


def trl_course(started: float, out: Path) -> Course:
    """From steps.jsonl of trl_side.py."""
    rows = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    return Course(
        started=started,
        began=next(row["time"] for row in rows if row["event"] == "begin"),
        ends=[row["time"] for row in steps],
        rewards=[row["reward"] for row in steps],
        lengths=[row["length_mean"] for row in steps],
    )


def summary(
    course: Course, usages: Sequence[Usage], *, batch: int, warm_steps: int
) -> dict[str, Any]:
    """The numbers of one run. Steady state is what follows `warm_steps`; start-up stands apart."""
    ends = course.ends
    seconds = [b - a for a, b in zip([course.began, *ends], ends, strict=False)]
    steady = seconds[warm_steps:]
    goal = next((i for i, reward in enumerate(course.rewards) if reward >= GOAL), None)
    return {
        "start_up_s": course.began - course.started,
        "s_per_step_mean": statistics.fmean(steady),
        "s_per_step_median": statistics.median(steady),
        "samples_per_s": batch / statistics.fmean(steady),
        "cpu_s_per_step": _cpu_per_step(ends[warm_steps:], usages),
        "steps_to_goal": None if goal is None else goal + 1,
        "s_to_goal": None if goal is None else ends[goal] - course.began,
        "s_to_goal_with_start_up": None if goal is None else ends[goal] - course.started,
        "s_all_steps": ends[-1] - course.began,
        "peak_pss_bytes": max((usage.pss_bytes for usage in usages), default=0),
        "peak_processes": max((usage.num_processes for usage in usages), default=0),
        "step_seconds": [round(value, 4) for value in seconds],
        "rewards": [round(value, 4) for value in course.rewards],
        "response_lengths": [round(value, 2) for value in course.lengths],
    }


def _cpu_per_step(ends: Sequence[float], usages: Sequence[Usage]) -> float | None:
    """CPU seconds of all processes per step of the steady state; None for too short a run."""
    inside = [usage for usage in usages if ends[0] <= usage.time <= ends[-1]]
    if len(inside) < 2:
        return None
    first, last = inside[0], inside[-1]
    steps = sum(first.time < end <= last.time for end in ends)
    return (last.cpu_s - first.cpu_s) / steps if steps else None
