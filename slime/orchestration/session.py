"""One run from start to end: the folder, Ray, the actors, the trackers; what `train.py` drives."""

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import ray

from slime.config.config import Config
from slime.config.hooks import check_hooks
from slime.errors import SlimeError
from slime.observability.logging import setup_logging
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
from slime.orchestration.placement import count_slots, make_placement
from slime.orchestration.ray_cluster import connect, resolve_device
from slime.orchestration.rollout_manager import RolloutInfo, RolloutManager, RolloutResult
from slime.orchestration.train_group import TrainGroup
from slime.orchestration.waiting import wait_for

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 40.0

Area = Literal["rollout", "train", "eval"]
STEP_KEYS: dict[Area, StepKey] = {
    "rollout": "rollout/step",
    "train": "train/step",
    "eval": "eval/step",
}
# What the terminal shows of each area; metrics.jsonl has all. None: everything.
SHOWN: dict[Area, tuple[str, ...] | None] = {
    "rollout": (
        "rollout/raw_reward",
        "rollout/response_len/mean",
        "rollout/truncated_ratio",
        "perf/rollout_time",
        "perf/tokens_per_gpu_per_sec",
    ),
    "train": (
        "train/loss",
        "train/kl_loss",
        "train/entropy_loss",
        "train/pg_clipfrac",
        "train/train_rollout_logprob_abs_diff",
        "train/grad_norm",
        "train/lr-pg_0",
    ),
    "eval": None,
}


class Session:
    """The two sides of a run and its records. Made by `open_session`.

    Attributes:
        config: with `num_rollout` and the device settled.
        first_rollout: 0, or the round after the checkpoint that was loaded.
    """

    def __init__(self, config: Config, folder: RunFolder, trackers: Trackers) -> None:
        self.config = config
        self.first_rollout = 0
        self._trackers = trackers
        check_hooks(config)
        self._trains = not config.debug_rollout_only
        self._rolls = not config.debug_train_only
        self._train_step = 0
        num_slots = sum(count_slots(config, train=self._trains, rollout=self._rolls)[:2])
        connect(config, num_slots)
        device = resolve_device(config)
        placement = make_placement(config, device=device, train=self._trains, rollout=self._rolls)
        make: Any = ray.remote(RolloutManager)
        self._manager = make.options(num_cpus=0).remote(
            config, placement, folder.path, dp_size(config, self._trains)
        )
        self._info_call = self._manager.start.remote()
        self._group = TrainGroup(config, placement, folder.path) if self._trains else None

    def start(self) -> None:
        """Wait for both sides, load the checkpoint, give the engines the trainer's weights."""
        timeout_s = self.config.startup_timeout_s
        info: RolloutInfo = self._wait(
            self._info_call, "start engines and read the data", timeout_s + 60.0
        )
        self.config = dataclasses.replace(self.config, num_rollout=info.num_rollout)
        self._rollouts_per_epoch = info.rollouts_per_epoch
        if self._group is not None:
            self.first_rollout = self._group.start(self.config)
        if self.config.start_rollout_id is not None:
            self.first_rollout = self.config.start_rollout_id
        if self.first_rollout > 0:
            self._wait(
                self._manager.load.remote(self.first_rollout - 1), "load its state", timeout_s
            )
        if self._group is not None and self._rolls:
            self._group.connect_engines(info.engine_urls)
            self.update_weights(self.first_rollout - 1)
        logger.info("rollouts %d to %d", self.first_rollout, info.num_rollout - 1)

    def start_generate(self, rollout_id: int) -> "ray.ObjectRef[RolloutResult]":
        """Begin generating a round; `finish_generate` waits for it."""
        return self._manager.generate.remote(rollout_id, self._save_is_due(rollout_id))

    def wait_generated(self, rollout_id: int, call: "ray.ObjectRef[RolloutResult]") -> None:
        """Wait until a round has been generated, without taking it."""
        self._wait(call, f"generate rollout {rollout_id}", self.config.rollout_timeout_s + 60.0)

    def finish_generate(
        self, rollout_id: int, call: "ray.ObjectRef[RolloutResult]"
    ) -> RolloutResult:
        """The round's batches; logs its metrics."""
        timeout_s = self.config.rollout_timeout_s + 60.0
        result: RolloutResult = self._wait(call, f"generate rollout {rollout_id}", timeout_s)
        self._log("rollout", rollout_id, result.metrics)
        return result

    def train(self, rollout_id: int, rollout: RolloutResult) -> None:
        """Update the model on a round; logs its metrics."""
        if self._group is None:
            return
        start = time.perf_counter()
        step_metrics, rollout_metrics = self._group.train(rollout_id, rollout.batches)
        call_time = {"perf/train_call_time": time.perf_counter() - start}
        self._log("rollout", rollout_id, rollout_metrics | call_time, quiet=True)
        first_step = rollout_id * len(step_metrics)
        for step, metrics in enumerate(step_metrics, start=first_step):
            self._log("train", step, metrics)

    def update_weights(self, rollout_id: int) -> None:
        """Bring the engines to the trainer's weights; logs the cost."""
        if self._group is not None and self._rolls:
            metrics = self._group.update_weights()
            self._log("rollout", max(rollout_id, 0), metrics, quiet=True)

    def evaluate(self, rollout_id: int, *, before: bool = False) -> None:
        """Evaluate when it is due after `rollout_id`, or `before` the first round; logs the metrics."""
        config = self.config
        if config.eval_interval is None or not self._rolls:
            return
        if before and (config.skip_eval_before_train or rollout_id != 0):
            return
        if before or is_due(
            rollout_id, config.eval_interval, self._rollouts_per_epoch, config.num_rollout
        ):
            call = self._manager.evaluate.remote(rollout_id)
            step = rollout_id if before else rollout_id + 1
            metrics = self._wait(
                call, f"evaluate after rollout {rollout_id}", config.rollout_timeout_s
            )
            self._log("eval", step, metrics)

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint when it is due after `rollout_id`; the data source wrote its part after generating."""
        if self._group is not None and self._save_is_due(rollout_id):
            start = time.perf_counter()
            self._group.save(rollout_id)
            self._log(
                "rollout",
                rollout_id,
                {"perf/save_model_time": time.perf_counter() - start},
                quiet=True,
            )

    def stop(self) -> None:
        """End the servers; errors here are logged, so that they hide no earlier one."""
        with _logged("stopping the trainers"):
            if self._group is not None:
                self._group.stop()
        with _logged("stopping the engines"):
            self._wait(self._manager.stop.remote(), "stop the engines", STOP_TIMEOUT_S)

    def _save_is_due(self, rollout_id: int) -> bool:
        config = self.config
        if config.save is None or not self._trains:
            return False
        per_epoch = self._rollouts_per_epoch if config.save_interval else None
        return is_due(rollout_id, config.save_interval, per_epoch, config.num_rollout)

    def _wait(self, call: "ray.ObjectRef[Any]", action: str, timeout_s: float) -> Any:
        return wait_for({"rollout manager": call}, action=action, timeout_s=timeout_s)[0]

    def _log(
        self, area: Area, step: int, metrics: dict[str, float], *, quiet: bool = False
    ) -> None:
        if not metrics:
            return
        self._trackers.log(metrics, step_key=STEP_KEYS[area], step=step)
        line = summary_line(metrics, SHOWN[area])
        if line and not quiet:
            logger.info("%s %d: %s", area, step, line)


def dp_size(config: Config, trains: bool) -> int:
    """Data-parallel ranks of the trainer; 0 when nothing trains."""
    if not trains:
        return 0
    model_parallel = (
        config.tensor_model_parallel_size
        * config.pipeline_model_parallel_size
        * config.context_parallel_size
    )
    return config.actor_num_nodes * config.actor_num_gpus_per_node // model_parallel


def is_due(
    rollout_id: int, interval: int | None, per_epoch: int | None, num_rollout: int | None
) -> bool:
    """Whether a periodic action follows this round: every `interval`, at an epoch's end, and after the last."""
    done = rollout_id + 1
    periods: Sequence[int | None] = (interval, per_epoch, num_rollout)
    return done == num_rollout or any(period and done % period == 0 for period in periods[:2])


def make_trackers(config: Config, folder: RunFolder) -> Trackers:
    """metrics.jsonl always, TensorBoard when asked."""
    trackers: list[Tracker] = [JsonlTracker(folder.metrics)]
    if config.use_tensorboard:
        path = tensorboard_folder(
            folder.tensorboard, config.tb_project_name, config.tb_experiment_name
        )
        trackers.append(TensorBoardTracker(path))
    return Trackers(trackers)


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """A started session; whatever happens inside, servers end and records are closed."""
    folder = RunFolder.open(config.run_dir)
    setup_logging("INFO", "driver", folder=folder.logs)
    logger.info("run folder: %s", folder.path)
    folder.write_config(config.to_json())
    trackers = make_trackers(config, folder)
    session: Session | None = None
    try:
        session = Session(config, folder, trackers)
        session.start()
        yield session
    finally:
        if session is not None:
            session.stop()
        trackers.close()
        folder.release()
        ray.shutdown()


@contextmanager
def _logged(action: str) -> Iterator[None]:
    try:
        yield
    except SlimeError as error:
        logger.warning("%s: %s", action, error)
