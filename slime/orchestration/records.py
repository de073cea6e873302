"""What a run writes down: every metric to the trackers, a few to the terminal, seconds per round."""

import logging
import time
from collections.abc import Mapping, Sequence

from slime.config.config import Config
from slime.observability.live import LiveView, open_live_view
from slime.observability.metrics import summary_line
from slime.observability.phases import Phase, Seconds, side_metrics
from slime.observability.runs import RunFolder
from slime.observability.services import open_services
from slime.observability.trackers import (
    JsonlTracker,
    TensorBoardTracker,
    Tracker,
    Trackers,
    read_metrics,
    tensorboard_folder,
)

logger = logging.getLogger(__name__)

Metrics = dict[str, float]

# What the terminal shows; metrics.jsonl has all.
_SHOWN_ROLLOUT = (
    "rollout/raw_reward",
    "rollout/response_len/mean",
    "rollout/truncated_ratio",
    "perf/rollout_time",
    "perf/tokens_per_gpu_per_sec",
)
_SHOWN_TRAIN = (
    "train/loss",
    "train/kl_loss",
    "train/entropy_loss",
    "train/pg_clipfrac",
    "train/train_rollout_logprob_abs_diff",
    "train/grad_norm",
    "train/lr-pg_0",
)


class Records:
    """The trackers of a run, and the clock of its rounds.

    Both sides measure a round; what they say is one row of the trackers, written when the round ends.
    """

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self._config, self._folder = config, folder
        # Outside services first: one that refuses should do so before engines start.
        self._services = open_services(config, folder.path)
        self._trackers = Trackers(self._services)
        self._view: LiveView | None = None
        self._round: Metrics = {}
        self._phases: Seconds = {}
        self._train_start = self._train_end = time.perf_counter()

    def begin(self, first_rollout: int, num_rollout: int) -> None:
        """Open the trackers and the live view.

        Rounds from `first_rollout` on will be written, for the first time or again; there are
        `num_rollout` in the whole run.
        """
        self._trackers = make_trackers(self._config, self._folder, self._services)
        self._view = open_live_view(self._config.live_view, first_rollout, num_rollout)

    def progress(self, counts: Mapping[str, float]) -> None:
        """Counts of the running round, for the terminal."""
        if self._view is not None:
            self._view.progress(counts)

    def add(self, metrics: Metrics) -> None:
        """More metrics of the present round."""
        self._round |= metrics

    def rollout(self, rollout_id: int, metrics: Metrics) -> None:
        """A generated round."""
        self.add(metrics)
        if self._view is not None:
            self._view.rollout(metrics)
        self._show(f"rollout {rollout_id}", summary_line(metrics, _SHOWN_ROLLOUT))

    def train_begins(self) -> None:
        """The trainer stops waiting."""
        self._train_start = time.perf_counter()

    def train(self, rollout_id: int, steps: Sequence[Metrics], rollout_metrics: Metrics) -> None:
        """A trained round: metrics of each optimizer step, and means over the round."""
        now = time.perf_counter()
        wait, work = self._train_start - self._train_end, now - self._train_start
        self._train_end = now
        times = {"perf/train_wait_time": wait, "perf/wait_time_ratio": wait / (wait + work)}
        self.add(rollout_metrics | times)
        for step, metrics in enumerate(steps, start=rollout_id * len(steps)):
            self._trackers.log(metrics, step_key="train/step", step=step)
        if steps:
            if self._view is not None:
                self._view.train(steps[-1])
            count = f" ({len(steps)} steps, the last)" if len(steps) > 1 else ""
            self._show(f"train {rollout_id}{count}", summary_line(steps[-1], _SHOWN_TRAIN))

    def round_ends(self, rollout_id: int, sides: Mapping[str, Seconds]) -> None:
        """Write the round's row.

        Args:
            sides: where the time since the round before went, on each side; `round` is the driver's
                own clock.
        """
        own = sides["round"]
        row = dict(self._round)
        for side, seconds in sides.items():
            row |= side_metrics(side, seconds)
        total = sum(own.values())
        row |= {
            "perf/round_time": total,
            "perf/step_time": total - own.get(Phase.EVAL, 0.0),
        }
        self._round = {}
        self._count(own)
        self._trackers.log(row, step_key="rollout/step", step=rollout_id)
        if self._view is not None:
            self._view.round_ends(rollout_id)

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """An evaluation; its time is in the row of the round after it."""
        self._trackers.log(metrics, step_key="eval/step", step=step)
        shown = [name for name in metrics if name.count("/") == 1]
        self._show(f"eval at {step}", summary_line(metrics, shown))

    def ends(self, own: Seconds) -> None:
        """Say where the time of all rounds went; `own` is what came after the last one's row."""
        self._count(own)
        total = sum(self._phases.values())
        if total > 0:
            parts = sorted(self._phases.items(), key=lambda item: -item[1])
            shares = "  ".join(f"{name} {100 * part / total:.1f} %" for name, part in parts)
            self._show(f"{total:.1f} s of rounds", shares)

    def close(self) -> None:
        """Flush and close the trackers, and wipe the view."""
        if self._view is not None:
            self._view.close()
        self._trackers.close()

    def _count(self, own: Seconds) -> None:
        for name, seconds in own.items():
            self._phases[name] = self._phases.get(name, 0.0) + seconds

    def _show(self, what: str, line: str) -> None:
        if line:
            logger.info("%s: %s", what, line)


def make_trackers(config: Config, folder: RunFolder, services: Sequence[Tracker]) -> Trackers:
    """metrics.jsonl always, TensorBoard when asked, then `services`."""
    trackers: list[Tracker] = [JsonlTracker(folder.metrics)]
    if config.use_tensorboard:
        path = tensorboard_folder(
            folder.tensorboard, config.tb_project_name, config.tb_experiment_name
        )
        # What a resume will do again has been put aside: these are the rows that count.
        trackers.append(TensorBoardTracker(path, earlier=read_metrics(folder.metrics)))
    return Trackers([*trackers, *services])
