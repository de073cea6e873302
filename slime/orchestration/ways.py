"""How the weights of a training rank reach the engines: which transport, and who sends."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from slime.config.config import Config
from slime.config.engine_rules import pausing
from slime.engines.control import EngineControl
from slime.engines.protocol import PauseMode
from slime.errors import ConfigError, WeightSyncError
from slime.orchestration.disk_way import WayOverDisk, hook_of
from slime.orchestration.host_copies import HostCopies
from slime.orchestration.placement import engine_kind
from slime.weights.disk import DiskTransport, prove_tensors
from slime.weights.gloo import GlooTransport
from slime.weights.local import LocalControl, LocalTransport, Ranks
from slime.weights.receiver import ReceiverTransport
from slime.weights.sync import Pausable, SyncReport, sync_weights
from slime.weights.transport import WeightTransport
from slime.weights.versions import Versions


class _Control(Pausable, Protocol):
    def close(self) -> None: ...


class Way(Protocol):
    """One rank's part in every sync with some engines."""

    def open(self) -> None:
        """Connect to the engines."""
        ...

    def begin(self) -> None:
        """Another sync."""
        ...

    def sync(self, named: Iterable[tuple[str, Tensor]], version: str) -> SyncReport | None:
        """Bring the engines to these weights; the report of a rank that talks to engines."""
        ...

    def failed(self, error: Exception) -> None:
        """Tell the other ranks, unless they are through."""
        ...

    def close(self) -> None:
        """Leave the engines."""
        ...


@dataclass
class WayToEngines:
    """As `Way`, by a transport that moves buckets.

    Attributes:
        pause_mode: what becomes of requests that run.
        has_others: other ranks send too, and all must succeed before the engines go on.
        is_agreed: whether the senders have met in this sync; they do so once.
        bucket_bytes, verify: as in `sync_weights`.
        prove: called before the first sync: raises where tensors one by one would not bring what files do.
    """

    control: _Control
    transport: WeightTransport
    pause_mode: PauseMode = PauseMode.ABORT
    has_others: bool = False
    is_agreed: bool = False
    bucket_bytes: int = 1
    verify: bool = True
    prove: Callable[[], None] | None = None

    def open(self) -> None:
        """Connect to the engines."""
        self.transport.open()

    def begin(self) -> None:
        """Another sync."""
        self.is_agreed = False

    def sync(self, named: Iterable[tuple[str, Tensor]], version: str) -> SyncReport:
        """As `sync_weights`."""
        if self.prove is not None:
            self.prove()
            self.prove = None
        return sync_weights(
            named,
            control=self.control,
            transport=self.transport,
            version=version,
            bucket_bytes=self.bucket_bytes,
            verify=self.verify,
            pause_mode=self.pause_mode,
            agree=self.agree,
        )

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
    versions: Versions | None = None,
    unproven: str | None = None,
) -> Way | None:
    """The way of training rank `rank` to the engines at `urls`; None for one that sends nothing.

    Engines on the trainer's own slots are fed by the rank of their slot, others by rank 0.

    Args:
        host: address of this process that the engines can reach.
        has_same_weights: as in `ReceiverTransport`.
        engines_are_away: without the memory of their cache (`Turns`), so that a sync leaves them paused.
        versions: of rank 0, where weights go through files.
        unproven: a checkpoint of which the engines have to show first that tensors one by one bring what its
            files do.
    """
    if config.update_weight_transport == "disk":
        return _way_over_disk(config, urls, rank, host, versions, resumes=not engines_are_away)
    is_local = config.colocate and engine_kind(config) != "embedded"
    if rank != 0 and not is_local:
        return None
    timeout_s = config.weight_sync_timeout_s
    control = EngineControl(urls, timeout_s=timeout_s)
    mode = pause_mode(config)
    on_cpu = config.device == "cpu"
    if engine_kind(config) == "embedded":
        transport = GlooTransport(control, host=host, timeout_s=timeout_s)
        way = WayToEngines(control, transport, mode)
    elif is_local:
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
            flushes=mode is PauseMode.ABORT,
        )
        way = WayToEngines(local, local_transport, mode, has_others=True)
    else:
        receivers = ReceiverTransport(
            control,
            host=host,
            timeout_s=timeout_s,
            way="gloo" if on_cpu else "nccl",
            has_same_weights=has_same_weights,
            flushes=mode is PauseMode.ABORT,
        )
        way = WayToEngines(control, receivers, mode)
    way.bucket_bytes, way.verify = config.update_weight_buffer_size, config.verify_weight_sync
    if unproven is not None and rank == 0 and engine_kind(config) != "embedded":
        way.prove = partial(prove_tensors, control, unproven, host=host, timeout_s=timeout_s)
    return way


def _way_over_disk(
    config: Config,
    urls: tuple[str, ...],
    rank: int,
    host: str,
    versions: Versions | None,
    *,
    resumes: bool,
) -> Way | None:
    hook = hook_of(config)
    if rank != 0 and hook is None:
        return None
    timeout_s = config.weight_sync_timeout_s
    control = EngineControl(urls, timeout_s=timeout_s)
    transport = None
    if rank == 0:
        assert versions is not None, "rank 0 writes"
        local_dir = config.update_weight_local_checkpoint_dir
        copies = None
        if local_dir is not None:
            copies = HostCopies(urls, str(Path(local_dir).absolute()), timeout_s=timeout_s)
        transport = DiskTransport(
            control,
            versions,
            copies=copies,
            host=host,
            timeout_s=timeout_s,
        )
    return WayOverDisk(
        control,
        transport,
        verify=config.verify_weight_sync,
        pause_mode=pause_mode(config),
        resumes=resumes,
        hook=hook,
        args=config.to_namespace(),
        gather=_gather,
    )


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
