"""Timers: seconds per named piece of work in this process, for `perf/{name}_time` and the timeline."""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from slime.observability.timeline import flush_timeline, span


class Timers:
    """Seconds spent per name since the last `take`. Threads may add at the same time."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, seconds: float) -> None:
        """Add `seconds` to what `name` has taken so far."""
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @contextmanager
    def measure(self, name: str) -> Generator[None]:
        """Add the wall-clock seconds of the `with` block to `name`, also when the block raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def take(self) -> dict[str, float]:
        """Seconds per name since the last call, which starts the next count at zero."""
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        return seconds


_process_timers = Timers()


@contextmanager
def timer(name: str, rollout_id: int | None = None) -> Generator[None]:
    """A `with` block whose seconds are added to `name` in this process; a span of its timeline too.

    Args:
        rollout_id: the round it belongs to, for the timeline; by default that of the block around.

    Example:
        with timer("update_weights"):
            ...
        metrics |= time_metrics(take_timers())   # {"perf/update_weights_time": 0.8}
    """
    with span(name, rollout_id), _process_timers.measure(name):
        yield


def take_timers() -> dict[str, float]:
    """Seconds per name in this process since the last call; clears them and flushes the timeline."""
    flush_timeline()
    return _process_timers.take()


def time_metrics(seconds: dict[str, float]) -> dict[str, float]:
    """`take_timers()` under the names they are logged by: `perf/{name}_time`."""
    return {f"perf/{name}_time": value for name, value in seconds.items()}
