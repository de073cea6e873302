"""The live view of a run: a few lines at the foot of the terminal, under the log.

Only where stderr is a terminal; elsewhere the log alone tells the same.
"""

import atexit
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from slime.observability.logging import send_console_lines_to
from slime.observability.metrics import format_number
from slime.observability.waits import WaitRow, current_waits

REFRESH_PER_S = 4.0
HISTORY = 24
_BAR_WIDTH = 24
_LABEL_WIDTH = 7
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_CELLS = 16
_SHOWN = (
    ("rollout/response_len/mean", "response", "tokens"),
    ("perf/tokens_per_gpu_per_sec", "", "tokens/s per GPU"),
    ("train/grad_norm", "grad norm", ""),
    ("train/loss", "loss", ""),
)


def wants_live_view(asked: bool | None, stream: TextIO) -> bool:
    """Whether to show it: a terminal, and asked for or no sign that a machine reads along."""
    if not stream.isatty() or asked is False:
        return False
    is_plain = os.environ.get("TERM") == "dumb"
    return bool(asked) or not (is_plain or os.environ.get("NO_COLOR") or os.environ.get("CI"))


class LiveView:
    """What the driver knows of the run, drawn four times a second until `close`.

    Args:
        console: where to draw.
        first_rollout, num_rollout: rounds of this start, and of the whole run.
    """

    def __init__(self, console: Console, first_rollout: int, num_rollout: int) -> None:
        self._console = console
        self._done = first_rollout
        self._num_rollout = num_rollout
        self._started = self._round_started = time.monotonic()
        self._progress: Mapping[str, float] = {}
        self._last: dict[str, float] = {}
        self._rewards: deque[float] = deque(maxlen=HISTORY)
        self._round_times: deque[float] = deque(maxlen=HISTORY)
        self._live = Live(
            console=console,
            get_renderable=self.render,
            refresh_per_second=REFRESH_PER_S,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            vertical_overflow="crop",
        )

    def open(self) -> None:
        """Begin to draw; log lines scroll above from now on."""
        self._live.start(refresh=True)
        send_console_lines_to(_AboveView(self._console))
        atexit.register(self.close)  # a second Ctrl-C may skip the orderly end

    def close(self) -> None:
        """Wipe the view; the cursor and the log are as before."""
        atexit.unregister(self.close)
        self._live.stop()  # first: until then stderr is a stand-in of rich's
        send_console_lines_to(None)

    def progress(self, counts: Mapping[str, float]) -> None:
        """Counts of the running round, as `slime.rollout.state.Progress` gives them."""
        self._progress = counts

    def train(self, metrics: Mapping[str, float]) -> None:
        """Metrics of the last optimizer step of a round."""
        self._last |= metrics

    def rollout(self, metrics: Mapping[str, float]) -> None:
        """Metrics of a generated round."""
        self._last |= metrics
        if (reward := metrics.get("rollout/raw_reward")) is not None:
            self._rewards.append(reward)

    def round_ends(self, rollout_id: int) -> None:
        """The round is over."""
        now_s = time.monotonic()
        self._round_times.append(now_s - self._round_started)
        self._done, self._round_started = rollout_id + 1, now_s

    def render(self) -> RenderableType:
        """The view as it is now."""
        rows = current_waits()
        width = min(_BAR_WIDTH, max(8, self._console.width // 4))
        table = Table.grid(padding=(0, 1), expand=False)
        table.add_column(no_wrap=True, style="bold", min_width=_LABEL_WIDTH)
        table.add_column(width=width)
        table.add_column(no_wrap=True, overflow="ellipsis")
        room = self._console.width - width - _LABEL_WIDTH - 2
        run = self._bar(self._done, self._num_rollout, width)
        table.add_row("run", run, fitting(self._run_parts(), room))
        groups = (self._progress.get("accepted", 0.0), self._progress.get("target", 0.0))
        table.add_row("round", self._bar(*groups, width), fitting(self._round_parts(), room))
        if self._last:
            spark = sparkline(self._rewards)
            table.add_row("reward", spark, fitting(self._metric_parts(), room))
        lines = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in now(rows)]
        return Group(Rule(style="dim"), table, *lines)

    def _bar(self, done: float, total: float, width: int) -> ProgressBar:
        return ProgressBar(total=max(total, 1.0), completed=done, width=width)

    def _run_parts(self) -> list[str]:
        gone = _clock(time.monotonic() - self._started)
        parts = [f"{self._done} of {self._num_rollout} rounds", f"{gone} gone"]
        if self._round_times and self._done < self._num_rollout:
            left = statistics.median(self._round_times) * (self._num_rollout - self._done)
            parts.append(f"about {_clock(left)} left")
        return parts

    def _round_parts(self) -> list[str]:
        counts = self._progress
        if "target" not in counts:
            return ["no round is being generated"]
        parts = [f"{counts['accepted']:.0f} of {counts['target']:.0f} groups"]
        if counts.get("dropped"):
            parts.append(f"{counts['dropped']:.0f} dropped")
        parts.append(f"{counts.get('running', 0):.0f} samples running")
        if counts.get("tokens") and counts.get("seconds"):
            parts.append(f"{format_number(round(counts['tokens'] / counts['seconds']))} tokens/s")
        return parts

    def _metric_parts(self) -> list[str]:
        parts = [format_number(self._rewards[-1])] if self._rewards else []
        for name, label, unit in _SHOWN:
            if name in self._last:
                parts.append(f"{label} {format_number(self._last[name])} {unit}".strip())
        return parts


def fitting(parts: Sequence[str], room: int) -> str:
    """As many of the first parts as fit into `room` columns, with commas between."""
    text = ""
    for part in parts:
        longer = f"{text}, {part}" if text else part
        if len(longer) > room:
            break
        text = longer
    return text


def now(rows: Sequence[WaitRow]) -> list[str]:
    """What each side does, from what the driver waits for: one line for each of them."""
    sides = {"rollout": "idle", "trainer": "idle"}
    for row in rows:
        side = "trainer" if row.on.startswith("train rank") else "rollout"
        sides[side] = f"{row.what} ({_clock(row.waited_s)})"
    return [f"{side:<8}{doing}" for side, doing in sides.items()]


def sparkline(values: Sequence[float] | deque[float]) -> str:
    """One character per value, the lowest to the highest: `▁▃▅█`; the last 16 values."""
    shown = list(values)[-_SPARK_CELLS:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    if high == low:
        return _BLOCKS[3] * len(shown)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((value - low) / (high - low) * top)] for value in shown)


def open_live_view(asked: bool | None, first_rollout: int, num_rollout: int) -> LiveView | None:
    """A view that is drawn from now on, or None where none is wanted."""
    if not wants_live_view(asked, sys.stderr):
        return None
    view = LiveView(Console(stderr=True), first_rollout, num_rollout)
    view.open()
    return view


class _AboveView:
    """A text stream whose lines rich puts above the view."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> int:
        # A long line is left to the terminal: broken by us, it could not be copied as one.
        self._console.print(Text(text.rstrip("\n")), soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


def _clock(seconds: float) -> str:
    """`12 s`, `3:05`, `2:03:05`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
