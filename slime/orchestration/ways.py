"""How the weights of a training rank reach the engines: which transport, and who sends."""

import contextlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist

from slime.config.config import Config
from slime.config.engine_rules import pausing
from slime.engines.control import EngineControl
from slime.engines.protocol import PauseMode
from slime.errors import ConfigError, WeightSyncError
from slime.orchestration.placement import engine_kind
from slime.weights.gloo import GlooTransport
from slime.weights.local import LocalControl, LocalTransport, Ranks
from slime.weights.receiver import ReceiverTransport
from slime.weights.sync import Pausable
from slime.weights.transport import WeightTransport


class _Control(Pausable, Protocol):
    def close(self) -> None: ...


@dataclass
class WayToEngines:
    """One rank's way.

    Attributes:
        pause_mode: what becomes of requests that run.
        has_others: other ranks send too, and all must succeed before the engines go on.
        is_agreed: whether the senders have met in this sync; they do so once.
    """

    control: _Control
    transport: WeightTransport
    pause_mode: PauseMode = PauseMode.ABORT
    has_others: bool = False
    is_agreed: bool = False

    def begin(self) -> None:
        """Another sync."""
        self.is_agreed = False

    def agree(self) -> None:
        """Wait until all senders are through.

        Raises:
            WeightSyncError: one of them failed.
        """
        if self.has_others:
            self._meet(None)

    def failed(self, error: Exception) -> None:
        """Tell the other senders, unless they are through; raises nothing of what they tell."""
        if self.has_others and not self.is_agreed:
            with contextlib.suppress(WeightSyncError):
                self._meet(str(error))

    def close(self) -> None:
        """Leave the engines."""
        self.transport.close()
        self.control.close()

    def _meet(self, problem: str | None) -> None:
        problems = [text for text in _gather(problem) if text is not None]
        self.is_agreed = True
        if problems:
            raise WeightSyncError(problems[0])


def make_way(
    config: Config,
    urls: tuple[str, ...],
    *,
    rank: int,
    host: str,
    has_same_weights: bool,
    engines_are_away: bool,
) -> WayToEngines | None:
    """The way of training rank `rank` to the engines at `urls`; None for one that sends nothing.

    Engines on the trainer's own slots are fed by the rank of their slot, others by rank 0.

    Args:
        host: address of this process that the engines can reach.
        has_same_weights: as in `ReceiverTransport`.
        engines_are_away: without the memory of their cache (`Turns`), so that a sync leaves them paused.
    """
    is_local = config.colocate and engine_kind(config) != "embedded"
    if rank != 0 and not is_local:
        return None
    timeout_s = config.weight_sync_timeout_s
    control = EngineControl(urls, timeout_s=timeout_s)
    mode = pause_mode(config)
    if engine_kind(config) == "embedded":
        transport = GlooTransport(control, host=host, timeout_s=timeout_s)
        return WayToEngines(control, transport, mode)
    on_cpu = config.device == "cpu"
    if not is_local:
        return WayToEngines(
            control,
            ReceiverTransport(
                control,
                host=host,
                timeout_s=timeout_s,
                way="gloo" if on_cpu else "nccl",
                has_same_weights=has_same_weights,
                # SGLang ends itself when it is to empty the cache of a request that is paused.
                flushes=mode is PauseMode.ABORT,
            ),
            mode,
        )
    local = LocalControl(control, rank, stay_paused=engines_are_away)
    local_transport = LocalTransport(
        control,
        local,
        Ranks(rank, _gather),
        first_seed=config.seed,
        host=host,
        timeout_s=timeout_s,
        way="gloo" if on_cpu else "ipc",
        has_same_weights=has_same_weights,
    )
    return WayToEngines(local, local_transport, has_others=True)


def pause_mode(config: Config) -> PauseMode:
    """`--update-weight-pause-mode`, or what is exact and cheap for the kind of engine.

    The embedded engine reads the tokens of running requests anew. SGLang would find them in its prefix
    cache as they were under the old weights: there requests end, and their clients go on with them.

    Raises:
        ConfigError: SGLang would mix old and new weights; with `--device auto` only now is it known
            that it is SGLang.
    """
    for problem in pausing(config):
        raise ConfigError(problem)
    if config.update_weight_pause_mode is not None:
        return PauseMode(config.update_weight_pause_mode)
    return PauseMode.RETRACT if engine_kind(config) == "embedded" else PauseMode.ABORT


def _gather(value: Any) -> list[Any]:
    """Objects of all training ranks, in their order; collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
