"""What a run writes down: every metric to the trackers, a few to the terminal, seconds per round."""

import logging
import time
from collections.abc import Sequence

from slime.config.config import Config
from slime.observability.metrics import summary_line
from slime.observability.runs import RunFolder
from slime.observability.trackers import (
    JsonlTracker,
    TensorBoardTracker,
    Tracker,
    Trackers,
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
        self._trackers = make_trackers(config, folder)
        self._round: Metrics = {}
        self._round_start = self._train_start = self._train_end = time.perf_counter()

    def add(self, metrics: Metrics) -> None:
        """More metrics of the present round."""
        self._round |= metrics

    def rollout(self, rollout_id: int, metrics: Metrics) -> None:
        """A generated round."""
        self.add(metrics)
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
            count = f" ({len(steps)} steps, the last)" if len(steps) > 1 else ""
            self._show(f"train {rollout_id}{count}", summary_line(steps[-1], _SHOWN_TRAIN))

    def round_ends(self, rollout_id: int) -> None:
        """Write the round's row, with `perf/step_time`: everything since the round before."""
        now = time.perf_counter()
        row = self._round | {"perf/step_time": now - self._round_start}
        self._round, self._round_start = {}, now
        self._trackers.log(row, step_key="rollout/step", step=rollout_id)

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """An evaluation; its time belongs to no round."""
        self._trackers.log(metrics, step_key="eval/step", step=step)
        shown = [name for name in metrics if name.count("/") == 1]
        self._show(f"eval at {step}", summary_line(metrics, shown))
        self._round_start = time.perf_counter()

    def close(self) -> None:
        """Flush and close the trackers."""
        self._trackers.close()

    def _show(self, what: str, line: str) -> None:
        if line:
            logger.info("%s: %s", what, line)


def make_trackers(config: Config, folder: RunFolder) -> Trackers:
    """metrics.jsonl always, TensorBoard when asked."""
    trackers: list[Tracker] = [JsonlTracker(folder.metrics)]
    if config.use_tensorboard:
        path = tensorboard_folder(
            folder.tensorboard, config.tb_project_name, config.tb_experiment_name
        )
        trackers.append(TensorBoardTracker(path))
    return Trackers(trackers)
