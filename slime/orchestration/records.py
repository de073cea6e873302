"""What a run writes down: every metric to the trackers, a few to the terminal, seconds per round."""

import logging
import time
from collections.abc import Sequence
from typing import Literal

from slime.config.config import Config
from slime.observability.metrics import summary_line
from slime.observability.runs import RunFolder
from slime.observability.trackers import (
    JsonlTracker,
    StepKey,
    TensorBoardTracker,
    Tracker,
    Trackers,
    tensorboard_folder,
)

logger = logging.getLogger(__name__)

Area = Literal["rollout", "train", "eval"]
Metrics = dict[str, float]

_STEP_KEYS: dict[Area, StepKey] = {
    "rollout": "rollout/step",
    "train": "train/step",
    "eval": "eval/step",
}
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
    """The trackers of a run, and the clock of its rounds."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self._trackers = make_trackers(config, folder)
        self._round_start = self._train_end = time.perf_counter()
        self._train_start = self._train_end

    def rollout(self, rollout_id: int, metrics: Metrics) -> None:
        """A generated round."""
        self.add("rollout", rollout_id, metrics)
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
        self.add("rollout", rollout_id, rollout_metrics | times)
        for step, metrics in enumerate(steps, start=rollout_id * len(steps)):
            self.add("train", step, metrics)
        if steps:
            count = f" ({len(steps)} steps, the last)" if len(steps) > 1 else ""
            self._show(f"train {rollout_id}{count}", summary_line(steps[-1], _SHOWN_TRAIN))

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """An evaluation."""
        self.add("eval", step, metrics)
        shown = [name for name in metrics if name.count("/") == 1]
        self._show(f"eval at {step}", summary_line(metrics, shown))
        self._round_start = time.perf_counter()  # its time belongs to no round

    def round_ends(self, rollout_id: int) -> None:
        """The next round begins; logs `perf/step_time`, everything between two rounds' starts."""
        now = time.perf_counter()
        self.add("rollout", rollout_id, {"perf/step_time": now - self._round_start})
        self._round_start = now

    def add(self, area: Area, step: int, metrics: Metrics) -> None:
        """Metrics that no line on the terminal shows."""
        if metrics:
            self._trackers.log(metrics, step_key=_STEP_KEYS[area], step=step)

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
