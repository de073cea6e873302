"""Phases: each moment of a process belongs to exactly one, so that they add up to its wall time.

Three sides keep such a clock: the driver (`perf/round/*`), every training rank (`perf/trainer/*`) and
the rollout manager for the engines (`perf/engines/*`). What nothing claims is idle: it is measured
as the rest, never set. Measured: a claim costs 4 microseconds.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum


class Phase(StrEnum):
    """What a moment was spent on; in metrics `perf/{side}/{phase}_time`."""

    GENERATE = "generate"
    REWARD = "reward"
    DATA = "data"
    LOG_PROBS = "log_probs"
    TRAIN = "train"
    SYNC = "sync"
    OFFLOAD = "offload"
    SAVE = "save"
    EVAL = "eval"
    IDLE = "idle"


Seconds = dict[Phase, float]
Segment = tuple[Phase, float]  # phase and seconds, one after the other

# Of what goes on side by side in one process the first one counts.
_SIDE_BY_SIDE: tuple[Phase, ...] = (Phase.EVAL, Phase.GENERATE, Phase.REWARD, Phase.DATA)
MAX_SEGMENTS = 4096


class PhaseClock:
    """Seconds per phase since the last `take`; their sum is the time that has passed. Thread-safe.

    Args:
        now: seconds, from any beginning.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._nested: list[list[Phase]] = []
        self._counts = dict.fromkeys(_SIDE_BY_SIDE, 0)
        self._seconds: Seconds = {}
        self._records: list[list[Segment]] = []
        self._current = Phase.IDLE
        self._since = now()

    @contextmanager
    def phase(self, name: Phase) -> Generator[None]:
        """The `with` block is spent on `name`; a block inside it counts for itself alone."""
        claim = [name]  # a list, because claims are told apart by identity
        with self._lock:
            self._nested.append(claim)
            self._update()
        try:
            yield
        finally:
            with self._lock:
                self._nested = [other for other in self._nested if other is not claim]
                self._update()

    @contextmanager
    def side_by_side(self, name: Phase) -> Generator[None]:
        """One of many things at once, in tasks or threads; goes before any `phase` around it.

        While several go on the moment belongs to the first of evaluation, generation, reward, data:
        the time of a reward is that in which no answer was being written.
        """
        with self._lock:
            self._counts[name] += 1
            self._update()
        try:
            yield
        finally:
            with self._lock:
                self._counts[name] -= 1
                self._update()

    @contextmanager
    def record(self) -> Generator[list[Segment]]:
        """A list that holds, after the `with` block, what it was spent on, in order."""
        segments: list[Segment] = []
        with self._lock:
            self._close_segment()
            self._records.append(segments)
        try:
            yield segments
        finally:
            with self._lock:
                self._close_segment()
                self._records = [other for other in self._records if other is not segments]

    def explain_idle(self, seconds: float, segments: Iterable[Segment]) -> None:
        """Give `seconds` that were counted as idle to what another process did meanwhile.

        Only the last of the segments, as long as the wait was: the others came before it began.
        What they do not explain stays idle.
        """
        with self._lock:
            self._close_segment()
            for name, part in last_of(segments, seconds):
                self._add(Phase.IDLE, -part)
                self._add(name, part)

    def take(self) -> Seconds:
        """Seconds of each phase that had any, since the last call."""
        with self._lock:
            self._close_segment()
            seconds, self._seconds = self._seconds, {}
        return seconds

    def _update(self) -> None:
        now = next((name for name in _SIDE_BY_SIDE if self._counts[name]), None)
        if now is None:
            now = self._nested[-1][0] if self._nested else Phase.IDLE
        if now is not self._current:
            self._close_segment()
            self._current = now

    def _close_segment(self) -> None:
        now = self._now()
        seconds, self._since = now - self._since, now
        if not seconds:
            return
        self._add(self._current, seconds)
        for record in self._records:
            _append(record, (self._current, seconds))

    def _add(self, name: Phase, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def _append(record: list[Segment], segment: Segment) -> None:
    name, seconds = segment
    if record and record[-1][0] is name:
        record[-1] = (name, record[-1][1] + seconds)
        return
    record.append(segment)
    if len(record) > MAX_SEGMENTS:  # the older half loses its order, not its seconds
        half = record[: MAX_SEGMENTS // 2]
        record[: len(half)] = sum_of(half).items()


def sum_of(segments: Iterable[Segment]) -> Seconds:
    """Seconds per phase."""
    seconds: Seconds = {}
    for name, part in segments:
        seconds[name] = seconds.get(name, 0.0) + part
    return seconds


def last_of(segments: Iterable[Segment], seconds: float) -> list[Segment]:
    """The segments of the last `seconds`, newest first; the oldest of them cut."""
    found: list[Segment] = []
    for name, part in reversed(list(segments)):
        if seconds <= 0:
            break
        found.append((name, min(part, seconds)))
        seconds -= part
    return found


# --- this process's clock ---

clock = PhaseClock()
phase = clock.phase
side_by_side = clock.side_by_side


# --- as metrics ---

PHASES_MARKDOWN = """\

## Where the time of a round goes

Each side has a clock on which every moment belongs to one phase, so that the phases of a side add up
to the round: `perf/{side}/{phase}_time`. A round is the time from its row to the one before, so that
the evaluation and the checkpoint after a round stand in the row of the next.

| phase | `round`: the driver | `trainer`: the mean of its ranks | `engines`: together |
|---|---|---|---|
| `generate` | waits for answers | | an answer is being written, or the rollout function works on its own |
| `reward` | waits for rewards | | rewards are awaited and no answer is being written |
| `data` | waits for prompts, batches | the rest of an update: advantages, its metrics | prompts, batches, metrics |
| `log_probs` | waits for them | `log_probs` and `ref_log_probs` | |
| `train` | waits for the optimizer steps | the optimizer steps, waits for other ranks included | |
| `sync` | waits for the engines to have the new weights | gathers and sends | paused for new weights |
| `offload` | waits for either side to leave or return | `sleep` and `wake_up` | memory released or resumed |
| `save` | waits for the checkpoint | writes it | the data source's part |
| `eval` | waits for the evaluation | | the evaluation |
| `idle` | the rest: its own work, Ray | the rest: waits for anything else | the rest: waits for anything else |

Of what goes on at once on one side, the first of `eval`, `generate`, `reward` and `data` counts. In
`train_async.py` the driver waits for the part of a generation that outlasts the training; what it
overlapped is in `perf/engines/generate_time`. `idle` is measured as the rest, never set. The
driver is idle in Ray's calls, while a batch travels to a rank for instance.
"""


def side_metrics(side: str, seconds: Mapping[Phase, float]) -> dict[str, float]:
    """`perf/{side}/{phase}_time` of one side, and the share that was idle.

    Args:
        side: `round`, `trainer` or `engines`.
        seconds: as `PhaseClock.take` gives them.
    """
    total, idle = sum(seconds.values()), seconds.get(Phase.IDLE, 0.0)
    times = {name: part for name, part in seconds.items() if part or name is Phase.IDLE}
    return {
        **{f"perf/{side}/{name}_time": part for name, part in times.items()},
        f"perf/{side}/idle_ratio": idle / total if total > 0 else 0.0,
    }


def mean_of(ranks: Sequence[Mapping[Phase, float]]) -> Seconds:
    """Seconds per phase, averaged over clocks of the same side."""
    names = {name for rank in ranks for name in rank}
    return {
        name: sum(rank.get(name, 0.0) for rank in ranks) / len(ranks)
        for name in Phase
        if name in names
    }
