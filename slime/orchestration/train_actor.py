"""One training rank: receives a batch, runs the update, sends weights."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slime.config.config import Config
from slime.config.quantization import is_quantized_checkpoint
from slime.engines.rendezvous import reserve_port
from slime.observability.doctor import register_process
from slime.observability.garbage import settle_memory
from slime.observability.logging import setup_logging
from slime.observability.phases import Phase, Seconds, Segment, clock, phase
from slime.observability.profile import take_timers, timer
from slime.observability.timeline import close_timeline, open_timeline, span
from slime.observability.waits import WARN_FRACTION, waiting
from slime.orchestration.placement import engine_kind
from slime.orchestration.ray_cluster import node_address

# Torch is imported in the methods: the driver, which only names this actor's class, does without.
if TYPE_CHECKING:
    from slime.checkpoint.fp8_format import Fp8Format
    from slime.data.batch import RolloutBatch
    from slime.orchestration.ways import Way
    from slime.training.interface import Trainer
    from slime.training.update import UpdateHooks, UpdateResult
    from slime.weights.sync import SyncReport
    from slime.weights.versions import Versions

logger = logging.getLogger(__name__)

ALL_RANKS = "all training ranks together"


@dataclass(frozen=True)
class TrainReport:
    """What one rank did with a round.

    Attributes:
        steps: metrics of each optimizer step, `train/...`.
        means: metrics of the round.
        consumed: per optimizer step the `Sample.index` of each row this rank computed on.
        segments: what its time was spent on.
    """

    steps: list[dict[str, float]]
    means: dict[str, float]
    consumed: list[list[int]]
    segments: list[Segment]


@dataclass(frozen=True)
class RankTimes:
    """Where the time of one rank went since it was asked last, seconds.

    Attributes:
        phases: all of it.
        timers: of single pieces of work, by name.
    """

    phases: Seconds
    timers: dict[str, float]


class TrainActor:
    """Ray actor of one training rank.

    Args:
        rank: global rank, 0 sends the weights.
        world_size: training ranks.
        run_dir: folder of the run.
    """

    def __init__(self, rank: int, world_size: int, run_dir: Path) -> None:
        setup_logging(
            "INFO", f"train rank {rank}", folder=run_dir / "logs", console_level="WARNING"
        )
        open_timeline(f"train rank {rank}", run_dir)
        register_process(f"train rank {rank}", run_dir)
        self._rank = rank
        self._world_size = world_size
        self._trainer: Trainer | None = None
        self._way: Way | None = None
        self._is_asleep = False
        self._hooks: UpdateHooks | None = None
        self._trained_rounds = 0
        self._versions: Versions | None = None
        self._format: Fp8Format | None = None
        self._is_proven = False

    def prepare(self) -> tuple[str, int]:
        """Import the training stack (seconds); returns address and port of the process group's store.

        The port is reserved in rank 0, which will listen there, and 0 in the others.
        """
        # Early, while the engines start, and before `random` has its seed: rich, which httpx brings, draws a
        # number from it when it is imported, and a resumed run would draw once more than one never ended.
        import slime.backends.megatron.trainer
        import slime.orchestration.ways  # noqa: F401

        host = node_address()
        return host, reserve_port(host) if self._rank == 0 else 0

    def start(self, config: Config, master_addr: str, master_port: int) -> int:
        """Build and load the model; returns the first rollout to run. Collective over all ranks."""
        from slime.backends.megatron.trainer import MegatronTrainer

        self._config = config
        os.environ.update(config.train_env_vars)
        self._trainer = MegatronTrainer(
            config,
            rank=self._rank,
            world_size=self._world_size,
            local_rank=self._rank % config.actor_num_gpus_per_node,
            master_addr=master_addr,
            master_port=master_port,
        )
        timeout_s = config.startup_timeout_s
        with span("load_model"), _together("load the model", timeout_s):
            self._trained_rounds = self._trainer.load()
        settle_memory()
        self._prepare_sync()
        return self._trained_rounds

    def _prepare_sync(self) -> None:
        """What lasts as long as this rank, whichever engines come and go."""
        from slime.checkpoint.fp8_format import Fp8Format
        from slime.orchestration.disk_way import make_versions

        if self._config.debug_train_only:
            return
        if self._rank == 0:
            self._versions = make_versions(self._config)
        if (
            engine_kind(self._config) != "embedded"
        ):  # which computes with what such a folder stands for
            self._format = Fp8Format.read(self._config.hf_checkpoint or "")

    def connect_engines(self, urls: tuple[str, ...]) -> None:
        """Open the way for weights to these engines instead of those before; collective."""
        with phase(Phase.SYNC):
            self._disconnect()
            self._way = self._make_way(urls, engines_are_away=bool(self._config.offload_rollout))
            if self._way is not None:
                self._way.open()

    def restore_engine(self, url: str) -> None:
        """Give one engine that was started again the current weights; collective over all ranks.

        The other engines go on generating: they are not in this transport's group. A trainer that
        sleeps wakes up for it.

        Raises:
            WeightSyncError, EngineUnavailable: as `sync_weights`.
        """
        slept = self._is_asleep
        if slept:
            self.wake_up()
        try:
            with phase(Phase.SYNC):
                self._restore(url)
        finally:
            if slept:
                self.sleep()

    def _restore(self, url: str) -> None:
        way = self._make_way((url,), engines_are_away=False)
        try:
            if way is not None:
                way.open()
            with span("restore_engine"):
                self._sync(way)
        finally:
            if way is not None:
                way.close()

    @property
    def _weight_version(self) -> str:
        """Rounds trained so far plus one: the same after a resume, and when an engine comes back."""
        return str(self._trained_rounds + 1)

    def update_weights(self) -> tuple[dict[str, float], str | None]:
        """Give the engines the current weights; (metrics, digest of the weights) from rank 0.

        Collective over all ranks. The digest is None on other ranks and without verification.
        """
        with span("update_weights"), phase(Phase.SYNC):
            report = self._sync(self._way)
        if report is None or self._rank != 0:
            return {}, None
        return report.metrics(), report.digest or None

    def _sync(self, way: "Way | None") -> "SyncReport | None":
        """One sync on the ranks that send; the others gather with them, all to the end."""
        weights = self._ready().named_weights()
        if way is None:
            with _together("gather the weights", self._config.weight_sync_timeout_s):
                exhaust(weights)
            return None
        way.begin()
        named = weights if self._format is None else self._format.of(weights)
        try:
            report = way.sync(named, self._weight_version)
        except Exception as error:
            exhaust(weights)  # the other ranks gather to the end
            way.failed(error)
            raise
        self._is_proven = True
        return report

    def train(self, rollout_id: int, batch: "RolloutBatch") -> TrainReport:
        """Update the model on this rank's batch."""
        # What is neither log-probs nor optimizer steps makes the data for them.
        with clock.record() as segments, phase(Phase.DATA):
            result = self._update(rollout_id, batch)
        self._trained_rounds = rollout_id + 1
        return TrainReport(
            steps=[_prefixed("train/", metrics) for metrics in result.step_metrics],
            means=_prefixed("rollout/", result.rollout_metrics),
            consumed=[batch.samples_of_step(step) for step in range(len(result.step_metrics))],
            segments=segments,
        )

    def _update(self, rollout_id: int, batch: "RolloutBatch") -> "UpdateResult":
        from slime.training.update import UpdateHooks, run_update

        if self._hooks is None:
            self._hooks = UpdateHooks.from_config(self._config, self._config.to_namespace())
        hooks, timeout_s = self._hooks, self._config.train_timeout_s
        with timer("train", rollout_id), _together(f"train on rollout {rollout_id}", timeout_s):
            return run_update(
                self._ready(), batch, self._config, rollout_id=rollout_id, hooks=hooks
            )

    def take_times(self) -> RankTimes:
        """Where this rank's time went since the last call."""
        return RankTimes(clock.take(), take_timers())

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint after round `rollout_id`; collective."""
        trainer, timeout_s = self._ready(), self._config.train_timeout_s
        # The export first: the checkpoint says that everything up to this round is done.
        with phase(Phase.SAVE):
            if self._config.save_hf:
                with span("save_hf", rollout_id), _together("save for Hugging Face", timeout_s):
                    trainer.save_hf(self._config.save_hf.format(rollout_id=rollout_id))
            with span("save_checkpoint", rollout_id), _together("save a checkpoint", timeout_s):
                trainer.save(rollout_id)

    def sleep(self) -> None:
        """Give the device's memory to the engines; `wake_up` comes before anything else."""
        with timer("sleep"), phase(Phase.OFFLOAD):
            self._ready().sleep()
        self._is_asleep = True

    def wake_up(self) -> None:
        """Take the memory back, every bit as it was."""
        with timer("wake_up"), phase(Phase.OFFLOAD):
            self._ready().wake_up()
        self._is_asleep = False

    def stop(self) -> None:
        """Leave the engines' weight group."""
        close_timeline()
        self._disconnect()

    def _make_way(self, urls: tuple[str, ...], *, engines_are_away: bool) -> "Way | None":
        """How weights of this rank reach these engines; None for a rank that sends none."""
        from slime.engines.rendezvous import address_towards
        from slime.orchestration.ways import make_way

        is_external = self._config.rollout_external_engine_addrs is not None
        starts_alike = self._trained_rounds == 0 and starts_like_engines(self._config)
        return make_way(
            self._config,
            urls,
            rank=self._rank,
            # Such engines may be on machines that are not of this cluster.
            host=address_towards(urls) if is_external else node_address(),
            # What they loaded, only their owner knows.
            has_same_weights=starts_alike and not is_external,
            engines_are_away=engines_are_away,
            versions=self._versions,
            unproven=self._config.hf_checkpoint if self._must_prove() else None,
        )

    def _must_prove(self) -> bool:
        """Whether engines have to show that tensors in 8 bits are to them what such files are."""
        return self._format is not None and self._config.verify_weight_sync and not self._is_proven

    def _disconnect(self) -> None:
        if self._way is not None:
            self._way.close()
        self._way = None

    def _ready(self) -> "Trainer":
        if self._trainer is None:
            raise RuntimeError("start() has not been called on this training rank")
        return self._trainer


def starts_like_engines(config: Config) -> bool:
    """Whether a run's first weights are those that its engines load, from the same files."""
    from slime.backends.megatron.state.sources import find_source, resolve_start

    changes = {"load_format", "quantization", "dtype"} & set(config.sglang_argv)
    own = find_source(config.hf_checkpoint or "")
    # Of weights in 8 bits the trainer has bf16, which comes back as other bits.
    is_other = bool(changes) or is_quantized_checkpoint(config.hf_checkpoint)
    return not is_other and resolve_start(config).source == own


def _together(action: str, deadline_s: float) -> waiting:
    """The wait of one rank in what all ranks do together; late after a part of the deadline."""
    warn_after_s = WARN_FRACTION * deadline_s
    return waiting(ALL_RANKS, action, deadline_s=deadline_s, warn_after_s=warn_after_s)


def exhaust(items: Iterable[object]) -> None:
    """Go through the items to the end, for what making them does on all ranks together."""
    for _ in items:
        pass


def _prefixed(area: str, metrics: dict[str, float]) -> dict[str, float]:
    return {area + name: value for name, value in metrics.items()}
