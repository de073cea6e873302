"""One run from start to end: the folder, Ray, the actors; what `train.py` drives."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from slime.config.config import Config
from slime.config.hooks import check_hooks
from slime.config.layout import count_slots, data_parallel_size, is_due
from slime.errors import EngineUnavailable, SlimeError
from slime.observability.doctor import begin_run, register_process
from slime.observability.ledger import Ledger
from slime.observability.logging import setup_logging
from slime.observability.phases import Phase, clock, phase
from slime.observability.runs import RunFolder
from slime.observability.timeline import close_timeline, flush_timeline, open_timeline, span
from slime.orchestration.attempts import await_predecessors, begin_attempt
from slime.orchestration.placement import engine_kind, make_placement
from slime.orchestration.ray_cluster import connect, resolve_device
from slime.orchestration.records import Records
from slime.orchestration.recovery import RayEngines, Recovery
from slime.orchestration.rollout_manager import (
    MANAGER_THREADS,
    RolloutInfo,
    RolloutManager,
    RolloutResult,
    RolloutStatus,
)
from slime.orchestration.round_times import RoundTimes, explain
from slime.orchestration.train_group import TrainGroup
from slime.orchestration.turns import Turns
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
        first_written_by: digest of the weights that wrote that round, if it was begun before the checkpoint.
    """

    def __init__(self, config: Config, folder: RunFolder, records: Records) -> None:
        check_hooks(config)
        self.config = config
        self.first_rollout = 0
        self.first_written_by: str | None = None
        self._folder = folder
        self._records = records
        self._ledger: Ledger | None = None
        self._consumed: list[list[int]] = []
        self._generating: tuple[int, ray.ObjectRef[RolloutResult]] | None = None
        self._last_saved: int | None = None
        self._weights: str | None = None
        # The last round that was begun, and the digest of the weights that write it.
        self._begun: tuple[int, str | None] = (-1, None)
        self._trained_rounds = 0
        self._trains = not config.debug_rollout_only
        self._rolls = not config.debug_train_only
        self._rollouts_per_epoch: int | None = None
        slots = count_slots(config, trains=self._trains, rolls=self._rolls)
        connect(config, slots.train + slots.rollout)
        device = resolve_device(config)
        config = self.config = dataclasses.replace(config, device=device)
        placement = make_placement(config, device=device, train=self._trains, rollout=self._rolls)
        if table := placement.table(config.rollout_num_gpus_per_engine):
            logger.info("devices:\n%s", table)
        make: Any = ray.remote(RolloutManager)
        ranks = data_parallel_size(config) if self._trains else 0
        self._manager = make.options(num_cpus=0, max_concurrency=MANAGER_THREADS).remote(
            config, placement, folder.path, ranks
        )
        self._status: ray.ObjectRef[RolloutStatus] | None = None
        # Engines, data and trainers come up side by side.
        self._starting = self._manager.start.remote()
        self._group = TrainGroup(config, placement, folder.path) if self._trains else None
        self._times = RoundTimes(self._manager, self._group, rolls=self._rolls)
        self._recovery: Recovery | None = None
        if self._group is not None and self._rolls:
            engines = RayEngines(self._manager, config.startup_timeout_s)
            self._recovery = Recovery(engines, self._group)
        self._turns: Turns | None = None
        if (
            self._recovery is not None
            and self._group is not None
            and engine_kind(config) != "embedded"
        ):
            self._turns = Turns(
                self._manager,
                self._group,
                trainer_leaves=bool(config.offload_train),
                engines_leave=bool(config.offload_rollout),
                wait=lambda call, action: self._wait(call, action, config.weight_sync_timeout_s),
            )

    def start(self) -> None:
        """Wait for both sides, load the checkpoint, give the engines the trainer's weights."""
        timeout_s = self.config.startup_timeout_s
        info: RolloutInfo = self._wait(
            self._starting, "start engines and read the data", timeout_s + MARGIN_S
        )
        self.config = dataclasses.replace(self.config, num_rollout=info.num_rollout)
        self._rollouts_per_epoch = info.rollouts_per_epoch
        if self._turns is not None:
            self._turns.trainers()
        if self._group is not None:
            self.first_rollout = self._group.start(self.config)
        elif self.config.start_rollout_id is not None:
            self.first_rollout = self.config.start_rollout_id
        self._trained_rounds = self.first_rollout
        self._ledger, self.first_written_by = begin_attempt(
            self._folder, self.config, self.first_rollout
        )
        self._records.begin(self.first_rollout, info.num_rollout)
        if self.first_rollout > 0:
            self._last_saved = self.first_rollout - 1
            load = self._manager.load.remote(self.first_rollout - 1)
            self._wait(load, "load its state", timeout_s)
        if self._group is not None and self._rolls:
            self.update_weights()
        if self.first_rollout < info.num_rollout:
            logger.info("rollouts %d to %d", self.first_rollout, info.num_rollout - 1)
        else:
            logger.info("no rollout is left of %d", info.num_rollout)
        self._times.take()  # the clocks of all sides begin

    def start_generate(
        self, rollout_id: int, written_by: str | None = None
    ) -> "ray.ObjectRef[RolloutResult]":
        """Begin generating a round; `finish_generate` waits for it.

        Args:
            written_by: digest of other weights than the engines', whose record of this round is taken up as well.
        """
        save = self._save_is_due(rollout_id)
        # A round that several weights write is no record of what one of them would write again.
        weights = None if self.config.update_weights_in_flight else self._weights
        call = self._manager.generate.remote(rollout_id, save, weights, written_by)
        self._generating = (rollout_id, call)
        self._begun = (rollout_id, weights)
        return call

    def wait_generated(
        self, rollout_id: int, call: "ray.ObjectRef[RolloutResult]"
    ) -> RolloutResult:
        """The round, once it has been generated."""
        timeout_s = self.config.rollout_timeout_s + MARGIN_S
        is_there, _ = ray.wait([call], timeout=0)
        with span("wait_rollout", rollout_id), clock.record() as waited:
            result: RolloutResult = self._wait(call, f"generate rollout {rollout_id}", timeout_s)
        if not is_there:
            explain(waited, result.segments)
        return result

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
            if self._recovery is not None:
                self._recovery.train_begins()
            if self._turns is not None:
                self._turns.trainers()
            with span("wait_train", rollout_id), clock.record() as waited:
                report = self._group.train(rollout_id, rollout.batches)
            explain(waited, report.segments)
            self._records.train(rollout_id, report.steps, report.means)
            self._consumed = report.consumed
            self._trained_rounds = rollout_id + 1
            if self._recovery is not None:
                self._recovery.trained()

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint when it is due: the commit point of everything up to this round.

        The data source wrote its part after generating. A kill before the checkpoint is whole takes
        the run back to the one before, a kill after it loses nothing of this round.
        """
        if self._group is not None and self._save_is_due(rollout_id):
            start = time.perf_counter()
            with (
                span("wait_save", rollout_id),
                phase(Phase.SAVE),
                self._turns.save() if self._turns else nullcontext(),
            ):
                self._group.save(rollout_id)
            # In the row of the next round: this one's is written.
            self._records.add({"perf/save_model_time": time.perf_counter() - start})
            self._committed(rollout_id)

    def _committed(self, rollout_id: int) -> None:
        assert self._ledger is not None
        assert self.config.save is not None
        begun, written_by = self._begun
        folder = str(Path(self.config.save).resolve())
        self._ledger.checkpoint(rollout_id, folder, written_by if begun > rollout_id else None)
        before, self._last_saved = self._last_saved, rollout_id
        if self._rolls and before is not None and not self.config.keep_rounds:
            self._manager.forget_rounds.remote(before)

    def finish(self) -> None:
        """Say in the ledger that the run came to its end, and where its time went."""
        assert self._ledger is not None
        self._ledger.end()
        self._records.ends(clock.take())

    def update_weights(self) -> None:
        """Bring the engines to the trainer's weights; logs the cost."""
        if self._recovery is not None:
            turn = self._turns.sync() if self._turns is not None else nullcontext()
            held = self._requests_held()
            with span("wait_update_weights"), phase(Phase.SYNC), turn, held as hold_s:
                metrics, self._weights = self._recovery.update_weights()
            if hold_s is not None:
                metrics["perf/update_weights_hold_time"] = hold_s
                total_s = metrics.get("perf/update_weights_time", 0.0)
                metrics["perf/update_weights_time"] = total_s + hold_s
            if self.config.fully_async:
                noted = self._manager.note_weights.remote(self._trained_rounds)
                self._wait(noted, "note the new weights", self.config.weight_sync_timeout_s)
            self._times.synced(metrics.get("perf/update_weights_time", 0.0))
            self._records.add(metrics)

    @contextmanager
    def _requests_held(self) -> Iterator[float | None]:
        """Answers that must end for new weights have ended inside, and none begins; the seconds that took.

        None, and nothing is done, where weights come between rounds.
        """
        if not self.config.update_weights_in_flight:
            yield None
            return
        timeout_s, start = self.config.weight_sync_timeout_s, time.perf_counter()
        self._wait(self._manager.hold_requests.remote(), "hold its requests", timeout_s)
        try:
            yield time.perf_counter() - start
        finally:
            gone = self._manager.let_requests_go.remote()
        self._wait(gone, "let its requests go", timeout_s)

    def end_round(self, rollout_id: int, rollout: RolloutResult) -> None:
        """Write down the round, and evaluate when it is due; a checkpoint comes after this."""
        sides, metrics = self._times.take()
        self._records.add(metrics)
        self._records.round_ends(rollout_id, sides)
        assert self._ledger is not None
        self._ledger.rollout(rollout_id, rollout.entry)
        if self._group is not None:
            self._ledger.train(rollout_id, self._consumed)
        flush_timeline()
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
            # One at a time: the books of a round are its own. With --fully-async it is apart from them.
            if self._generating is not None and not self.config.fully_async:
                self.wait_generated(*self._generating)
            call = self._manager.evaluate.remote(rollout_id)
            action = f"evaluate at rollout {rollout_id}"
            with span("wait_eval", rollout_id), phase(Phase.EVAL):
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
        calls = {"rollout manager": call}
        return wait_for(calls, action=action, timeout_s=timeout_s, on_tick=self._tick)[0]

    def _tick(self) -> None:
        """Once a second while this process waits for the rollout manager: ask how it is doing."""
        if self._status is None:
            self._status = self._manager.status.remote()
            return
        ready, _ = ray.wait([self._status], timeout=0)
        if ready:
            call, self._status = self._status, None
            try:
                status: RolloutStatus = ray.get(call)
            except RayError:  # it died: the call this process waits for says so
                return
            self._records.progress(status.progress)
            if status.failure is not None:
                raise EngineUnavailable(status.failure)
            if self._recovery is not None:
                self._recovery.restore(status.lost_engines, status.num_serving)


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """A started session; whatever happens inside, servers end and records are closed."""
    folder = RunFolder.open(config.run_dir)
    setup_logging("INFO", "driver", folder=folder.logs)
    open_timeline("driver", folder.path)
    await_predecessors(folder.path)
    begin_run(folder.path)
    register_process("driver", folder.path)
    logger.info("run folder: %s", folder.path)
    folder.write_config(config.to_json())
    records = Records(config, folder)
    session: Session | None = None
    try:
        session = Session(config, folder, records)
        with span("wait_start"):
            session.start()
        yield session
        session.finish()
    finally:
        if session is not None:
            session.stop()
        records.close()
        close_timeline()
        folder.release()
        ray.shutdown()


@contextmanager
def _logged(action: str) -> Iterator[None]:
    try:
        yield
    except SlimeError as error:
        logger.warning("%s: %s", action, str(error).splitlines()[0])
