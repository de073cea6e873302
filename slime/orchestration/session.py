"""One run from start to end: the folder, Ray, the actors; what `train.py` drives."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from slime.config.config import Config
from slime.config.hooks import check_hooks
from slime.errors import SlimeError
from slime.observability.logging import setup_logging
from slime.observability.runs import RunFolder
from slime.orchestration.placement import count_slots, make_placement
from slime.orchestration.ray_cluster import connect, resolve_device
from slime.orchestration.records import Records
from slime.orchestration.rollout_manager import RolloutInfo, RolloutManager, RolloutResult
from slime.orchestration.train_group import TrainGroup
from slime.orchestration.waiting import wait_for

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 40.0
# The manager's own deadline comes first: its message tells more than ours.
MARGIN_S = 60.0


class Session:
    """The two sides of a run. Made by `open_session`.

    Attributes:
        config: with `num_rollout` settled once `start` has returned.
        first_rollout: 0, or the round after the checkpoint that was loaded.
    """

    def __init__(self, config: Config, folder: RunFolder, records: Records) -> None:
        check_hooks(config)
        self.config = config
        self.first_rollout = 0
        self._records = records
        self._trains = not config.debug_rollout_only
        self._rolls = not config.debug_train_only
        self._rollouts_per_epoch: int | None = None
        connect(config, sum(count_slots(config, train=self._trains, rollout=self._rolls)[:2]))
        device = resolve_device(config)
        placement = make_placement(config, device=device, train=self._trains, rollout=self._rolls)
        make: Any = ray.remote(RolloutManager)
        ranks = dp_size(config) if self._trains else 0
        self._manager = make.options(num_cpus=0).remote(config, placement, folder.path, ranks)
        # Engines, data and trainers come up side by side.
        self._starting = self._manager.start.remote()
        self._group = TrainGroup(config, placement, folder.path) if self._trains else None

    def start(self) -> None:
        """Wait for both sides, load the checkpoint, give the engines the trainer's weights."""
        timeout_s = self.config.startup_timeout_s
        info: RolloutInfo = self._wait(
            self._starting, "start engines and read the data", timeout_s + MARGIN_S
        )
        self.config = dataclasses.replace(self.config, num_rollout=info.num_rollout)
        self._rollouts_per_epoch = info.rollouts_per_epoch
        if self._group is not None:
            self.first_rollout = self._group.start(self.config)
        elif self.config.start_rollout_id is not None:
            self.first_rollout = self.config.start_rollout_id
        if self.first_rollout > 0:
            load = self._manager.load.remote(self.first_rollout - 1)
            self._wait(load, "load its state", timeout_s)
        if self._group is not None and self._rolls:
            self._group.connect_engines(info.engine_urls)
            self._records.add(self._group.update_weights())
        logger.info("rollouts %d to %d", self.first_rollout, info.num_rollout - 1)

    def start_generate(self, rollout_id: int) -> "ray.ObjectRef[RolloutResult]":
        """Begin generating a round; `finish_generate` waits for it."""
        return self._manager.generate.remote(rollout_id, self._save_is_due(rollout_id))

    def wait_generated(
        self, rollout_id: int, call: "ray.ObjectRef[RolloutResult]"
    ) -> RolloutResult:
        """The round, once it has been generated."""
        timeout_s = self.config.rollout_timeout_s + MARGIN_S
        return self._wait(call, f"generate rollout {rollout_id}", timeout_s)

    def finish_generate(
        self, rollout_id: int, call: "ray.ObjectRef[RolloutResult]"
    ) -> RolloutResult:
        """The round, once it has been generated; logs its metrics."""
        result = self.wait_generated(rollout_id, call)
        self._records.rollout(rollout_id, result.metrics)
        return result

    def train(self, rollout_id: int, rollout: RolloutResult) -> None:
        """Update the model on a round; logs its metrics."""
        if self._group is not None:
            self._records.train_begins()
            steps, means = self._group.train(rollout_id, rollout.batches)
            self._records.train(rollout_id, steps, means)

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint when it is due; the data source wrote its part after generating."""
        if self._group is not None and self._save_is_due(rollout_id):
            start = time.perf_counter()
            self._group.save(rollout_id)
            seconds = time.perf_counter() - start
            self._records.add({"perf/save_model_time": seconds})

    def update_weights(self) -> None:
        """Bring the engines to the trainer's weights; logs the cost."""
        if self._group is not None and self._rolls:
            self._records.add(self._group.update_weights())

    def end_round(self, rollout_id: int) -> None:
        """Log the round's time, and evaluate when it is due."""
        self._records.round_ends(rollout_id)
        if self._is_due(rollout_id, self.config.eval_interval):
            self._evaluate(rollout_id, rollout_id + 1)

    def evaluate_first(self) -> None:
        """Evaluate before the first round of all, unless told not to."""
        if self.first_rollout == 0 and not self.config.skip_eval_before_train:
            self._evaluate(0, 0)

    def stop(self) -> None:
        """End the servers; errors here are logged, so that they hide no earlier one."""
        with _logged("stopping the trainers"):
            if self._group is not None:
                self._group.stop()
        with _logged("stopping the engines"):
            self._wait(self._manager.stop.remote(), "stop the engines", STOP_TIMEOUT_S)

    def _evaluate(self, rollout_id: int, step: int) -> None:
        if self.config.eval_interval is not None and self._rolls:
            call = self._manager.evaluate.remote(rollout_id)
            action = f"evaluate at rollout {rollout_id}"
            metrics = self._wait(call, action, self.config.rollout_timeout_s + MARGIN_S)
            self._records.evaluation(step, metrics)

    def _save_is_due(self, rollout_id: int) -> bool:
        # Without an interval only the last round is saved.
        saves = self.config.save is not None and self._trains
        is_last = rollout_id + 1 == self.config.num_rollout
        return saves and (is_last or self._is_due(rollout_id, self.config.save_interval))

    def _is_due(self, rollout_id: int, interval: int | None) -> bool:
        return is_due(rollout_id, interval, self._rollouts_per_epoch, self.config.num_rollout)

    def _wait(self, call: "ray.ObjectRef[Any]", action: str, timeout_s: float) -> Any:
        return wait_for({"rollout manager": call}, action=action, timeout_s=timeout_s)[0]


def dp_size(config: Config) -> int:
    """Data-parallel ranks of the trainer."""
    model_parallel = (
        config.tensor_model_parallel_size
        * config.pipeline_model_parallel_size
        * config.context_parallel_size
    )
    return config.actor_num_nodes * config.actor_num_gpus_per_node // model_parallel


def is_due(
    rollout_id: int, interval: int | None, per_epoch: int | None, num_rollout: int | None
) -> bool:
    """Whether a periodic action follows this round: every `interval`, at an epoch's end, at the end."""
    if interval is None:
        return False
    done = rollout_id + 1
    return done == num_rollout or any(
        period and done % period == 0 for period in (interval, per_epoch)
    )


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """A started session; whatever happens inside, servers end and records are closed."""
    folder = RunFolder.open(config.run_dir)
    setup_logging("INFO", "driver", folder=folder.logs)
    logger.info("run folder: %s", folder.path)
    folder.write_config(config.to_json())
    records = Records(config, folder)
    session: Session | None = None
    try:
        session = Session(config, folder, records)
        session.start()
        yield session
    finally:
        if session is not None:
            session.stop()
        records.close()
        folder.release()
        ray.shutdown()


@contextmanager
def _logged(action: str) -> Iterator[None]:
    try:
        yield
    except SlimeError as error:
        logger.warning("%s: %s", action, str(error).splitlines()[0])
