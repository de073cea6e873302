"""Where the time of a round went: the driver's clock, the training ranks', the rollout side's."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slime.observability.phases import Phase, Seconds, Segment, clock, mean_of
from slime.observability.profile import time_metrics
from slime.observability.timeline import span
from slime.orchestration.rollout_manager import RolloutTimes
from slime.orchestration.train_actor import RankTimes
from slime.orchestration.train_group import TrainGroup
from slime.orchestration.waiting import wait_for

if TYPE_CHECKING:
    import ray

TIMEOUT_S = 120.0


class RoundTimes:
    """Asks every side at the end of a round.

    Args:
        manager: handle of the rollout manager.
        group: the trainers, None when nothing trains.
        rolls: whether there are engines.
    """

    def __init__(self, manager: Any, group: TrainGroup | None, *, rolls: bool) -> None:
        self._manager = manager
        self._group = group
        self._rolls = rolls
        self._synced_s = 0.0

    def synced(self, seconds: float) -> None:
        """The engines were paused for new weights for so long; their side's clock does not know."""
        self._synced_s += seconds

    def take(self) -> tuple[dict[str, Seconds], dict[str, float]]:
        """Since the last call: seconds per phase of each side, `round` first; further metrics.

        The trainer's seconds are means over its ranks; `perf/{part}_time` is the slowest rank's.
        """
        with span("wait_times"):  # within it the round of every side ends
            calls: dict[str, ray.ObjectRef[Any]] = {
                "rollout manager": self._manager.take_times.remote()
            }
            if self._group is not None:
                calls |= self._group.start_take_times()
            answers = wait_for(calls, action="say where its time went", timeout_s=TIMEOUT_S)
            sides, metrics = {"round": clock.take()}, dict[str, float]()
        rollout: RolloutTimes = answers[0]
        ranks: list[RankTimes] = answers[1:]
        if ranks:
            sides["trainer"] = mean_of([rank.phases for rank in ranks])
            names = {name for rank in ranks for name in rank.timers}
            slowest = {name: max(rank.timers.get(name, 0.0) for rank in ranks) for name in names}
            metrics |= time_metrics(slowest)
        if self._rolls:
            sides["engines"] = self._with_sync(rollout.phases)
            metrics["perf/engines/samples_in_flight"] = rollout.samples_in_flight
        self._synced_s = 0.0
        return sides, metrics

    def _with_sync(self, engines: Seconds) -> Seconds:
        idle = engines.get(Phase.IDLE, 0.0)
        sync = min(self._synced_s, idle)
        return engines | {Phase.IDLE: idle - sync, Phase.SYNC: sync}


def explain(waited: Sequence[Segment], segments: Sequence[Segment]) -> None:
    """Of the time this process just waited, give what was idle to what the other one did.

    Args:
        waited: what this process's clock says.
        segments: what the other one's says; it was done when the wait was.
    """
    idle_s = sum(seconds for name, seconds in waited if name is Phase.IDLE)
    clock.explain_idle(idle_s, segments)
