"""One training rank: receives a batch, runs the update, sends weights."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from slime.config.config import Config
from slime.engines.control import EngineControl
from slime.engines.servers import free_port
from slime.observability.logging import setup_logging
from slime.observability.profile import take_timers, time_metrics, timer
from slime.orchestration.ray_cluster import node_address

# Torch is imported in the methods: the driver, which only names this actor's class, does without.
if TYPE_CHECKING:
    from slime.data.batch import RolloutBatch
    from slime.training.interface import Trainer
    from slime.weights.transport import WeightTransport

logger = logging.getLogger(__name__)


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
        self._rank = rank
        self._world_size = world_size
        self._trainer: Trainer | None = None
        self._control: EngineControl | None = None
        self._transport: WeightTransport | None = None
        self._weight_version = 0

    def prepare(self) -> tuple[str, int]:
        """Import the training stack (seconds); returns address and a free port for the process group's store."""
        import slime.backends.megatron.trainer  # noqa: F401 (imported early, while the engines start)

        return node_address(), free_port(node_address())

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
        return self._trainer.load()

    def connect_engines(self, urls: tuple[str, ...]) -> None:
        """Open the weight transport to the engines; only rank 0 does."""
        if self._rank != 0:
            return
        from slime.weights.gloo import GlooTransport

        timeout_s = self._config.weight_sync_timeout_s
        self._control = EngineControl(urls, timeout_s=timeout_s)
        self._transport = GlooTransport(self._control, host=node_address(), timeout_s=timeout_s)
        self._transport.open()

    def update_weights(self) -> dict[str, float]:
        """Give the engines the current weights; collective over all ranks, metrics from rank 0."""
        from slime.weights.sync import sync_weights

        self._weight_version += 1
        named = self._ready().named_weights()
        if self._control is None or self._transport is None:
            for _ in named:  # Take part in the gathers that rank 0 needs.
                pass
            return {}
        report = sync_weights(
            named,
            control=self._control,
            transport=self._transport,
            version=str(self._weight_version),
            bucket_bytes=self._config.update_weight_buffer_size,
            verify=self._config.verify_weight_sync,
        )
        return report.metrics()

    def train(
        self, rollout_id: int, batch: "RolloutBatch"
    ) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Update the model on this rank's batch; (metrics of each optimizer step, metrics of the rollout)."""
        from slime.training.update import UpdateHooks, run_update

        hooks = UpdateHooks.from_config(self._config, self._config.to_namespace())
        with timer("train"):
            result = run_update(
                self._ready(), batch, self._config, rollout_id=rollout_id, hooks=hooks
            )
        steps = [_prefixed("train/", metrics) for metrics in result.step_metrics]
        return steps, _prefixed("rollout/", result.rollout_metrics) | time_metrics(take_timers())

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint after round `rollout_id`; collective."""
        trainer = self._ready()
        trainer.save(rollout_id)
        if self._config.save_hf:
            trainer.save_hf(self._config.save_hf.format(rollout_id=rollout_id))

    def stop(self) -> None:
        """Leave the engines' weight group."""
        if self._transport is not None:
            self._transport.close()
        if self._control is not None:
            self._control.close()

    def _ready(self) -> "Trainer":
        if self._trainer is None:
            raise RuntimeError("start() has not been called on this training rank")
        return self._trainer


def _prefixed(area: str, metrics: dict[str, float]) -> dict[str, float]:
    return {area + name: value for name, value in metrics.items()}
