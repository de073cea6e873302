"""The rollout manager: data source, engines, rollout, evaluation, and a batch per training rank."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from slime.config.config import Config
from slime.data.chat import load_tokenizer
from slime.data.sample import Sample
from slime.engines.protocol import MemoryTag, PauseMode
from slime.errors import DataError
from slime.observability.doctor import register_process
from slime.observability.dumps import load_rollout, save_readable_samples, save_rollout
from slime.observability.garbage import settle_memory
from slime.observability.logging import setup_logging
from slime.observability.phases import Phase, Seconds, Segment, clock, phase, side_by_side
from slime.observability.profile import take_timers, time_metrics, timer
from slime.observability.timeline import close_timeline, open_timeline, span
from slime.orchestration.engine_fleet import EngineFleet
from slime.orchestration.engine_watch import Server
from slime.orchestration.placement import Placement
from slime.orchestration.rounds import (
    Round,
    RoundStore,
    frozen,
    rollout_entry,
    rollout_fingerprint,
)
from slime.plugins import load_function
from slime.rollout import fully_async_rollout, loop
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, call_rollout_fn
from slime.rollout.metrics import eval_metrics, rollout_metrics
from slime.rollout.state import progress

if TYPE_CHECKING:
    from slime.data.batch import RolloutBatch

logger = logging.getLogger(__name__)

# One call works, the others ask how it is doing: `status` answers while `generate` runs.
MANAGER_THREADS = 5
RECORD_AFTER_S = 0.02


@dataclass(frozen=True)
class RolloutInfo:
    """What the rollout side knows once it is up.

    Attributes:
        engine_urls: address of each engine; empty under `--debug-train-only`.
        num_rollout: rounds of the whole run.
        rollouts_per_epoch: rounds after which the data set has been seen once; None without a data
            set.
    """

    engine_urls: tuple[str, ...]
    num_rollout: int
    rollouts_per_epoch: int | None


@dataclass(frozen=True)
class RolloutResult:
    """One round.

    Attributes:
        batches: a reference to the batch of each data-parallel rank.
        metrics: of the round.
        entry: the round's line in the ledger.
        segments: what the time of making it was spent on.
    """

    batches: tuple["ray.ObjectRef[RolloutBatch]", ...]
    metrics: dict[str, float]
    entry: dict[str, Any]
    segments: list[Segment]


@dataclass(frozen=True)
class RolloutTimes:
    """Where the time of the rollout side went since it was asked last, seconds.

    Attributes:
        phases: all of it.
        samples_in_flight: mean number while at least one was.
    """

    phases: Seconds
    samples_in_flight: float


@dataclass(frozen=True)
class RolloutStatus:
    """How the running round is doing.

    Attributes:
        progress: counts of the running round, by name; empty between rounds.
        lost_engines: engines that died and came back, without weights as yet.
        num_serving: engines that have the current weights and answer.
        failure: why a dead engine or router is not started again any more; None while all is well.
    """

    progress: dict[str, float]
    lost_engines: tuple[Server, ...] = ()
    num_serving: int = 0
    failure: str | None = None


@dataclass(frozen=True)
class _Unrecorded:
    """A round that is to be written to the run folder, and the data source's state after it."""

    rollout_id: int
    made: Round
    weights: str
    data_state: dict[str, Any]


class RolloutManager:
    """Ray actor that turns prompts into training batches.

    Args:
        config: the whole configuration.
        placement: slots of the engines.
        run_dir: folder of the run.
        dp_size: data-parallel ranks to cut batches for; 0 when nothing trains.
    """

    def __init__(self, config: Config, placement: Placement, run_dir: Path, dp_size: int) -> None:
        setup_logging("INFO", "rollout manager", folder=run_dir / "logs", console_level="WARNING")
        open_timeline("rollout manager", run_dir)
        register_process("rollout manager", run_dir)
        self._config = config
        self._run_dir = run_dir
        self._dp_size = dp_size
        self._fleet: EngineFleet | None = None
        if not config.debug_train_only:
            self._fleet = EngineFleet(config, placement, run_dir / "logs")
        self._args = config.to_namespace(run_dir=str(run_dir))
        self._unrecorded: _Unrecorded | None = None
        self._recorder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="round-recorder")
        self._recording: Future[None] | None = None

    def start(self) -> RolloutInfo:
        """Start engines and read the data; returns what the driver needs to know.

        Raises:
            EngineUnavailable, DataError, ConfigError: as the part that failed says.
        """
        # The engines are starting already: what takes seconds here happens beside them.
        import slime.orchestration.training_data  # noqa: F401

        self._data_source = load_function(self._config.data_source_path)(self._args)
        settle_memory()
        if self._fleet is not None:
            self._fleet.start()
            vars(self._args).update(self._engine_facts(self._fleet))
        self._rollout_fn = load_function(self._config.rollout_function_path)
        self._eval_fn = load_function(
            self._config.eval_function_path or self._config.rollout_function_path
        )
        self._handed_out = time.perf_counter()
        self._rounds = RoundStore(self._run_dir / "rounds", rollout_fingerprint(self._config))
        per_epoch = self._rollouts_per_epoch()
        num_rollout = self._num_rollout(per_epoch)
        if self._config.fully_async:
            fully_async_rollout.begin(self._args, num_rollout)
        return RolloutInfo(tuple(self._fleet.urls) if self._fleet else (), num_rollout, per_epoch)

    def load(self, rollout_id: int) -> None:
        """Continue the data source after round `rollout_id` of an earlier run."""
        self._data_source.load(rollout_id)
        if self._fleet is not None:
            fully_async_rollout.restore(self._args, self._data_source, rollout_id)

    def note_weights(self, trained_rounds: int) -> None:
        """The engines have the weights after so many rounds; for --fully-async, which begins groups by it."""
        fully_async_rollout.note_weights(self._args, trained_rounds)

    def generate(
        self, rollout_id: int, save: bool, weights: str | None, written_by: str | None
    ) -> RolloutResult:
        """Run one round, or take up a recorded one, and cut it into batches.

        Args:
            save: write the state of the data source as this round left it, unfinished groups
                included. It happens here and not with the model's checkpoint, because by then the
                next round may have taken prompts.
            weights: digest of the weights in the engines; without one nothing is recorded.
            written_by: of others, whose record of this round is taken up as well.
        """
        # What is neither generation, reward nor saving makes batches: data.
        with clock.record() as segments, phase(Phase.DATA):
            references, metrics, entry = self._generate(rollout_id, save, weights, written_by)
        self._record()
        return RolloutResult(references, metrics, entry, segments)

    def _generate(
        self, rollout_id: int, save: bool, weights: str | None, written_by: str | None
    ) -> tuple[tuple["ray.ObjectRef[RolloutBatch]", ...], dict[str, float], dict[str, Any]]:
        """Batches, metrics and entry of a `RolloutResult`."""
        start = time.perf_counter()
        if save and self._config.fully_async:
            # The state has to be of one moment, and generation goes on when the round is there.
            fully_async_rollout.expect_save(self._args)
        with timer("rollout", rollout_id):
            made = self._recorded(rollout_id, weights, written_by)
            made = made or self._run_rollout(rollout_id, weights)
        samples = flatten_samples(made.groups)
        if not samples:
            raise DataError(
                f"rollout {rollout_id} returned no sample; look at the filters and the rollout function"
            )
        seconds = time.perf_counter() - start
        if self._config.fully_async:  # it was in the making since the round before was there
            seconds, self._handed_out = time.perf_counter() - self._handed_out, time.perf_counter()
        if save and not self._config.fully_async:
            with phase(Phase.SAVE):
                self._data_source.save(rollout_id)
        with timer("rollout_data", rollout_id):
            self._keep_samples(rollout_id, samples)
            batches, counts = self._make_batches(rollout_id, samples)
            entry = rollout_entry(made, self._trained_indexes(batches))
        metrics = self._log_metrics(rollout_id, samples, made.metrics, seconds)
        metrics |= counts | time_metrics(take_timers())
        if self._fleet is not None:
            metrics |= self._fleet.take_metrics()
        with span("put_batches", rollout_id):
            references = tuple(ray.put(batch) for batch in batches)
        return references, metrics, entry

    def evaluate(self, rollout_id: int) -> dict[str, float]:
        """Evaluate the current weights on the eval data sets; metrics `eval/...`."""
        with side_by_side(Phase.EVAL):
            return self._evaluate(rollout_id)

    def _evaluate(self, rollout_id: int) -> dict[str, float]:
        start = time.perf_counter()
        with span("eval", rollout_id):
            output = self._call(self._eval_fn, rollout_id, evaluation=True)
        assert isinstance(output, RolloutFnEvalOutput)
        seconds = time.perf_counter() - start
        metrics: dict[str, float] = dict(output.metrics or {})
        custom_log = self._config.custom_eval_rollout_log_function_path
        if custom_log and load_function(custom_log)(rollout_id, self._args, output.data, metrics):
            return {}
        datasets: list[Sequence[Sample]] = [d.get("samples", []) for d in output.data.values()]
        self._keep_samples(rollout_id, *datasets, evaluation=True)
        return metrics | eval_metrics(output.data, self._args) | {"perf/eval_time": seconds}

    def take_times(self) -> RolloutTimes:
        """Where the time went since the last call; answers while another call works."""
        phases, sample_seconds = clock.take(), progress.take_sample_seconds()
        busy_s = phases.get(Phase.GENERATE, 0.0) + phases.get(Phase.EVAL, 0.0)
        return RolloutTimes(phases, sample_seconds / busy_s if busy_s > 0 else 0.0)

    def status(self) -> RolloutStatus:
        """How the running round is doing; answers while another call works."""
        fleet = self._fleet
        if fleet is None:
            return RolloutStatus(progress=progress.counts())
        return RolloutStatus(
            progress=progress.counts(),
            lost_engines=fleet.waiting,
            num_serving=len(fleet.urls),
            failure=fleet.failure,
        )

    def bring_up_engines(self) -> tuple[Server, ...]:
        """The engines that are up, dead ones noticed; waits while none is."""
        return self._fleet.bring_up() if self._fleet is not None else ()

    def admit_engines(self, servers: tuple[Server, ...]) -> None:
        """Let engines that now have the current weights serve."""
        if self._fleet is not None:
            self._fleet.admit(servers)

    def release_engines(self, tags: tuple[MemoryTag, ...] = ()) -> None:
        """Let the engines leave their devices to the trainer, without tags altogether."""
        if self._fleet is not None:
            with phase(Phase.OFFLOAD):
                self._fleet.release_memory(*tags)

    def resume_engines(self, tags: tuple[MemoryTag, ...]) -> None:
        """Let them return."""
        if self._fleet is not None:
            with phase(Phase.OFFLOAD):
                self._fleet.resume_memory(*tags)

    def hold_requests(self) -> None:
        """Weights come while answers are written: end those that must end, and begin none meanwhile.

        Through files they come much later than this is called, and engines generate while those are written.
        """
        # Brings torch along; the driver, which only names this actor's class, does without.
        from slime.orchestration.ways import pause_mode

        if self._fleet is None or self._config.update_weight_transport == "disk":
            return
        if pause_mode(self._config) is PauseMode.ABORT:
            self._fleet.hold_requests()

    def let_requests_go(self) -> None:
        """The weights are there."""
        if self._fleet is not None:
            self._fleet.let_requests_go()

    def forget_rounds(self, up_to: int) -> None:
        """Remove the recorded rounds up to `up_to`."""
        self._rounds.prune(up_to)

    def stop(self) -> None:
        """End engines and router, and what still runs on the event loop."""
        self._recorder.shutdown()
        close_timeline()
        loop.shutdown()
        if self._fleet is not None:
            self._fleet.stop()

    def _engine_facts(self, fleet: EngineFleet) -> dict[str, Any]:
        """What plugins find in their flat args about this run's engines."""
        host, port = fleet.router_address
        return {
            "sglang_router_ip": host,
            "sglang_router_port": port,
            "engine_urls": fleet.urls,
            "num_engines": len(fleet.urls),
            "engine_supports_group_seeds": fleet.supports_group_seeds,
            "engine_heeds_seeds": fleet.heeds_seeds,
        }

    def _rollouts_per_epoch(self) -> int | None:
        if not self._config.rollout_global_dataset:
            return None
        return len(self._data_source) // (self._config.rollout_batch_size or 1)

    def _num_rollout(self, per_epoch: int | None) -> int:
        if self._config.num_rollout is not None:
            return self._config.num_rollout
        if not per_epoch:
            raise DataError(
                f"--num-epoch {self._config.num_epoch} needs a data set of at least --rollout-batch-size "
                f"{self._config.rollout_batch_size} prompts; found {len(self._data_source)}"
            )
        return per_epoch * (self._config.num_epoch or 1)

    def _recorded(
        self, rollout_id: int, weights: str | None, written_by: str | None
    ) -> Round | None:
        """The round as an earlier attempt of this run recorded it, if it may be used."""
        if weights is None or self._config.regenerate_on_resume:
            return None
        found = self._rounds.load(rollout_id, weights={weights, written_by or weights})
        if found is None:
            return None
        made, data_state = found
        self._data_source.load_state_dict(data_state)
        logger.info("rollout %d is taken from the record of an earlier start", rollout_id)
        return made

    def _run_rollout(self, rollout_id: int, weights: str | None) -> Round:
        config = self._config
        if config.load_debug_rollout_data:
            part = config.load_debug_rollout_data_subsample
            dump = load_rollout(config.load_debug_rollout_data, rollout_id, subsample=part)
            return Round([Sample.from_dict(sample) for sample in dump.samples], {}, None, None)
        first = self._next_group()
        # Who generates all the time says himself when an answer is being written; the rest is waiting.
        with phase(Phase.IDLE if config.fully_async else Phase.GENERATE):
            output = self._call(self._rollout_fn, rollout_id, evaluation=False)
        assert isinstance(output, RolloutFnTrainOutput)
        last = self._next_group()
        taken = None if first is None or last is None else (first, last)
        if output.fates is not None and output.fates.taken is not None:
            taken = output.fates.taken
        made = Round(output.samples, dict(output.metrics or {}), output.fates, taken)
        if weights is not None and hasattr(self._data_source, "state_dict"):
            self._keep_for_record(rollout_id, made, weights)
        return made

    def _call(self, function: Any, rollout_id: int, *, evaluation: bool) -> Any:
        """What a rollout function returns; servers that hang are looked for meanwhile."""
        with self._fleet.in_round() if self._fleet is not None else nullcontext():
            return call_rollout_fn(
                function, self._args, rollout_id, self._data_source, evaluation=evaluation
            )

    def _next_group(self) -> int | None:
        """Number of the next group the data source takes from its data; None if it has none."""
        return getattr(self._data_source, "sample_group_index", None)

    def _keep_for_record(self, rollout_id: int, made: Round, weights: str) -> None:
        """Hold the round as it is now, before hooks change its samples."""
        self._unrecorded = _Unrecorded(
            rollout_id,
            replace(made, groups=frozen(made.groups)),
            weights,
            self._data_source.state_dict(),
        )

    def _record(self) -> None:
        """Write the round that is held, in the background: the trainer is at work meanwhile."""
        held, self._unrecorded = self._unrecorded, None
        if self._recording is not None:
            self._recording.result()
        if held is not None:
            self._recording = self._recorder.submit(self._write, held)

    def _write(self, held: _Unrecorded) -> None:
        # First let this round's answer leave: beside this thread it would take 15 ms longer.
        time.sleep(RECORD_AFTER_S)
        self._rounds.save(
            held.rollout_id, held.made, weights=held.weights, data_state=held.data_state
        )

    def _trained_indexes(self, batches: Sequence["RolloutBatch"]) -> list[int] | None:
        """`Sample.index` of the rows in the batches; None when a user's function made them."""
        if self._config.custom_convert_samples_to_train_data_path:
            return None
        return [
            index
            for batch in batches
            for step in range(len(batch.steps))
            for index in batch.samples_of_step(step)
        ]

    def _keep_samples(
        self, rollout_id: int, *parts: Sequence[Sample], evaluation: bool = False
    ) -> None:
        """Write the first samples of each part to the run folder, and all of them where a debug flag says."""
        limit = self._config.samples_per_rollout_logged
        shown = [sample.to_dict() for part in parts for sample in part[:limit]]
        save_readable_samples(
            self._run_dir / "samples",
            rollout_id,
            shown,
            limit=len(shown),
            evaluation=evaluation,
            decode=self._decoder() if shown else None,
        )
        if self._config.save_debug_rollout_data:
            rows = (sample.to_dict() for part in parts for sample in part)
            save_rollout(
                self._config.save_debug_rollout_data, rollout_id, rows, evaluation=evaluation
            )

    def _decoder(self) -> Callable[[list[int]], str] | None:
        """Token ids to text, for the samples that people read; None without --hf-checkpoint."""
        path = self._config.hf_checkpoint
        return load_tokenizer(path).decode if path else None

    def _make_batches(
        self, rollout_id: int, samples: list[Sample]
    ) -> tuple[list["RolloutBatch"], dict[str, float]]:
        if self._dp_size == 0:
            return [], {}
        # Brings torch along; the driver, which only names this actor's class, does without.
        from slime.orchestration.training_data import make_batches

        return make_batches(
            samples, self._config, self._args, rollout_id=rollout_id, dp_size=self._dp_size
        )

    def _log_metrics(
        self, rollout_id: int, samples: list[Sample], extra: dict[str, float], seconds: float
    ) -> dict[str, float]:
        custom_log = self._config.custom_rollout_log_function_path
        if custom_log and load_function(custom_log)(
            rollout_id, self._args, samples, extra, seconds
        ):
            return {}
        return extra | rollout_metrics(samples, self._args, seconds)


def flatten_samples(groups: Any) -> list[Sample]:
    """Samples of nested lists (groups, fan-outs) in order.

    Raises:
        DataError: something in the lists is no Sample.
    """
    if isinstance(groups, Sample):
        return [groups]
    if isinstance(groups, list | tuple):
        return [sample for group in groups for sample in flatten_samples(group)]
    raise DataError(
        f"a rollout function returned {type(groups).__name__} where a Sample or a list of them belongs"
    )
