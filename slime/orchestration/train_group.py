"""All training ranks as one: the same call to every rank, one deadline, one answer."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from slime.config.config import Config
from slime.config.layout import data_parallel_rank
from slime.errors import SlimeError
from slime.observability.phases import sum_of
from slime.orchestration.placement import Placement
from slime.orchestration.train_actor import RankTimes, TrainActor, TrainReport
from slime.orchestration.waiting import wait_for

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from slime.data.batch import RolloutBatch

STOP_TIMEOUT_S = 20.0


class TrainGroup:
    """Train actors, one per slot of the placement.

    Args:
        config: the whole configuration.
        placement: `train_slots` gives rank i its slot.
        run_dir: folder of the run.
    """

    def __init__(self, config: Config, placement: Placement, run_dir: Path) -> None:
        self._config = config
        make: Any = ray.remote(TrainActor)
        world_size = len(placement.train_slots)
        self._actors: list[ActorHandle[TrainActor]] = [
            make.options(**placement.options(slot)).remote(rank, world_size, run_dir)
            for rank, slot in enumerate(placement.train_slots)
        ]
        # Imports take seconds: let them run while the engines start.
        self._prepared = self._call_all("prepare")

    def start(self, config: Config) -> int:
        """Build and load the model on all ranks; the first rollout to run."""
        timeout_s = config.startup_timeout_s
        master_addr, master_port = wait_for(
            self._prepared, action="import the training stack", timeout_s=timeout_s
        )[0]
        calls = self._call_all("start", config, master_addr, master_port)
        first: list[int] = wait_for(calls, action="build and load the model", timeout_s=timeout_s)
        if len(set(first)) != 1:
            raise SlimeError(
                f"training ranks disagree on the first rollout: {first}; do all nodes see the same --load?"
            )
        return first[0]

    def connect_engines(self, urls: tuple[str, ...]) -> None:
        """Open the way for weights to these engines."""
        calls = self._call_all("connect_engines", urls)
        wait_for(calls, action="connect to the engines", timeout_s=self._config.startup_timeout_s)

    def restore_engine(self, url: str) -> None:
        """Give one engine that was started again the current weights."""
        timeout_s = self._config.weight_sync_timeout_s
        wait_for(
            self._call_all("restore_engine", url), action="restore an engine", timeout_s=timeout_s
        )

    def update_weights(self) -> tuple[dict[str, float], str | None]:
        """Bring the engines to the current weights; metrics of the sync, digest of the weights."""
        timeout_s = self._config.weight_sync_timeout_s
        return wait_for(
            self._call_all("update_weights"), action="send the weights", timeout_s=timeout_s
        )[0]

    def train(
        self, rollout_id: int, batches: Sequence["ray.ObjectRef[RolloutBatch]"]
    ) -> TrainReport:
        """Update the model on one rollout.

        Returns:
            Rank 0's metrics, the samples of all ranks, the segments of the slowest one.
        """
        batch_of = [data_parallel_rank(self._config, rank) for rank in range(len(self._actors))]
        calls = {
            f"train rank {rank}": actor.train.remote(rollout_id, batches[batch_of[rank]])
            for rank, actor in enumerate(self._actors)
        }
        reports: list[TrainReport] = wait_for(
            calls, action=f"train on rollout {rollout_id}", timeout_s=self._config.train_timeout_s
        )
        # Ranks of one batch say the same: one of them speaks for it.
        per_batch = [reports[batch_of.index(n)].consumed for n in range(len(batches))]
        steps = [sorted(chain.from_iterable(ranks)) for ranks in zip(*per_batch, strict=True)]
        slowest = max(reports, key=lambda report: sum(sum_of(report.segments).values()))
        return replace(reports[0], consumed=steps, segments=slowest.segments)

    def start_take_times(self) -> dict[str, "ray.ObjectRef[RankTimes]"]:
        """Ask every rank where its time went since the last call; who is asked -> the call."""
        return self._call_all("take_times")

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint after round `rollout_id`."""
        calls = self._call_all("save", rollout_id)
        wait_for(calls, action="save a checkpoint", timeout_s=self._config.train_timeout_s)

    def sleep(self) -> None:
        """Give the devices' memory to the engines."""
        timeout_s = self._config.train_timeout_s
        wait_for(self._call_all("sleep"), action="leave its device", timeout_s=timeout_s)

    def wake_up(self) -> None:
        """Take it back."""
        timeout_s = self._config.train_timeout_s
        wait_for(self._call_all("wake_up"), action="return to its device", timeout_s=timeout_s)

    def stop(self) -> None:
        """Leave the engines."""
        wait_for(self._call_all("stop"), action="stop", timeout_s=STOP_TIMEOUT_S)

    def _call_all(self, method: str, *args: Any) -> dict[str, "ray.ObjectRef[Any]"]:
        return {
            f"train rank {rank}": getattr(actor, method).remote(*args)
            for rank, actor in enumerate(self._actors)
        }
