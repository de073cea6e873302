"""The rollout manager: data source, engines, rollout, evaluation, and a batch per training rank."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from slime.config.config import Config
from slime.data.sample import Sample
from slime.errors import DataError
from slime.observability.dumps import load_rollout, save_readable_samples, save_rollout
from slime.observability.logging import setup_logging
from slime.observability.profile import take_timers, time_metrics, timer
from slime.orchestration.engine_fleet import EngineFleet
from slime.orchestration.placement import Placement
from slime.plugins import load_function
from slime.rollout import loop
from slime.rollout.base_types import (
    RolloutFnEvalOutput,
    RolloutFnTrainOutput,
    call_rollout_fn,
)
from slime.rollout.metrics import eval_metrics, rollout_metrics

if TYPE_CHECKING:
    from slime.data.batch import RolloutBatch

logger = logging.getLogger(__name__)


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
    """One round: a reference to the batch of each data-parallel rank, and its metrics."""

    batches: tuple["ray.ObjectRef[RolloutBatch]", ...]
    metrics: dict[str, float]


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
        self._config = config
        self._run_dir = run_dir
        self._dp_size = dp_size
        self._fleet: EngineFleet | None = None
        if not config.debug_train_only:
            self._fleet = EngineFleet(config, placement, run_dir / "logs")
        self._args = config.to_namespace(run_dir=str(run_dir))

    def start(self) -> RolloutInfo:
        """Start engines and read the data; returns what the driver needs to know.

        Raises:
            EngineUnavailable, DataError, ConfigError: as the part that failed says.
        """
        # The engines are starting already: what takes seconds here happens beside them.
        import slime.orchestration.training_data  # noqa: F401

        self._data_source = load_function(self._config.data_source_path)(self._args)
        if self._fleet is not None:
            self._fleet.start()
            vars(self._args).update(self._engine_facts(self._fleet))
        self._rollout_fn = load_function(self._config.rollout_function_path)
        self._eval_fn = load_function(
            self._config.eval_function_path or self._config.rollout_function_path
        )
        per_epoch = self._rollouts_per_epoch()
        return RolloutInfo(
            tuple(self._fleet.urls) if self._fleet else (), self._num_rollout(per_epoch), per_epoch
        )

    def load(self, rollout_id: int) -> None:
        """Continue the data source after round `rollout_id` of an earlier run."""
        self._data_source.load(rollout_id)

    def generate(self, rollout_id: int, save: bool) -> RolloutResult:
        """Run one round and cut it into batches.

        Args:
            save: write the state of the data source as this round left it, unfinished groups
                included. It happens here and not with the model's checkpoint, because by then the
                next round may have taken prompts.
        """
        start = time.perf_counter()
        with timer("rollout"):
            groups, fn_metrics = self._run_rollout(rollout_id)
        samples = flatten_samples(groups)
        if not samples:
            raise DataError(
                f"rollout {rollout_id} returned no sample; look at the filters and the rollout function"
            )
        seconds = time.perf_counter() - start
        if save:
            self._data_source.save(rollout_id)
        with timer("rollout_data"):
            self._keep_samples(rollout_id, samples)
            batches, counts = self._make_batches(rollout_id, samples)
        metrics = self._log_metrics(rollout_id, samples, fn_metrics, seconds)
        metrics |= counts | time_metrics(take_timers())
        return RolloutResult(tuple(ray.put(batch) for batch in batches), metrics)

    def evaluate(self, rollout_id: int) -> dict[str, float]:
        """Evaluate the current weights on the eval data sets; metrics `eval/...`."""
        start = time.perf_counter()
        output = call_rollout_fn(
            self._eval_fn, self._args, rollout_id, self._data_source, evaluation=True
        )
        assert isinstance(output, RolloutFnEvalOutput)
        seconds = time.perf_counter() - start
        metrics: dict[str, float] = dict(output.metrics or {})
        custom_log = self._config.custom_eval_rollout_log_function_path
        if custom_log and load_function(custom_log)(rollout_id, self._args, output.data, metrics):
            return {}
        for data in output.data.values():
            self._keep_samples(rollout_id, data.get("samples", []), evaluation=True)
        return metrics | eval_metrics(output.data, self._args) | {"perf/eval_time": seconds}

    def stop(self) -> None:
        """End engines and router, and what still runs on the event loop."""
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

    def _run_rollout(self, rollout_id: int) -> tuple[Any, dict[str, float]]:
        config = self._config
        if config.load_debug_rollout_data:
            part = config.load_debug_rollout_data_subsample
            dump = load_rollout(config.load_debug_rollout_data, rollout_id, subsample=part)
            return [Sample.from_dict(sample) for sample in dump.samples], {}
        output = call_rollout_fn(
            self._rollout_fn, self._args, rollout_id, self._data_source, evaluation=False
        )
        assert isinstance(output, RolloutFnTrainOutput)
        return output.samples, dict(output.metrics or {})

    def _keep_samples(
        self, rollout_id: int, samples: Sequence[Sample], *, evaluation: bool = False
    ) -> None:
        """Write the first samples of the round to the run folder, and all of them where a debug flag says."""
        limit = self._config.samples_per_rollout_logged
        shown = [sample.to_dict() for sample in samples[:limit]]
        save_readable_samples(
            self._run_dir / "samples", rollout_id, shown, limit=limit, evaluation=evaluation
        )
        if self._config.save_debug_rollout_data:
            rows = (sample.to_dict() for sample in samples)
            save_rollout(
                self._config.save_debug_rollout_data, rollout_id, rows, evaluation=evaluation
            )

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
