"""Weights to SGLang servers on the trainer's own devices: each trainer rank feeds the engine rank beside it.

Bytes stay on the card. Trainer rank 0 sends the requests, whose invitations lead each engine rank to the
trainer rank of its slot.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slime.engines.control import EngineControl
from slime.engines.sglang.invitation import LEAVE, Invitation, Way
from slime.errors import EngineError, WeightSyncError
from slime.weights.receiver import HEALTH_TIMEOUT_S, Requests, check_unchanged, sums_of
from slime.weights.sender import DEPTH, Address, Sender
from slime.weights.transport import Bucket

PROBE_S = 5.0


@dataclass(frozen=True)
class Ranks:
    """The trainer's ranks.

    Attributes:
        rank: this one.
        gather: collective: objects of all ranks, in their order.
    """

    rank: int
    gather: Callable[[Any], list[Any]]


class LocalControl:
    """Of the engines: rank 0 pauses and resumes them all, the others leave it to rank 0.

    Args:
        control: all engines.
        rank: of the trainer.
        stay_paused: a sync does not resume them: a part of their memory is away, and who brings it
            back lets them go on.

    Attributes:
        urls: the engine that this rank feeds, if there is one.
    """

    def __init__(self, control: EngineControl, rank: int, *, stay_paused: bool = False) -> None:
        self._control = control
        self._leads = rank == 0
        self._stay_paused = stay_paused
        self.urls: tuple[str, ...] = ()
        self.timeout_s = control.timeout_s

    def pause(self, mode: str) -> None:
        """As EngineControl."""
        if self._leads:
            self._control.pause(mode)

    def resume(self) -> None:
        """As EngineControl."""
        if self._leads and not self._stay_paused:
            self._control.resume()

    def close(self) -> None:
        """As EngineControl."""
        self._control.close()


class LocalTransport:
    """From every trainer rank to the engine rank on its slot; every method is collective.

    Args:
        control: all engines.
        local: gets the address of this rank's engine.
        ranks: the trainer's.
        first_seed: of engine 0; `random_seed` tells an engine's number, and so its slots.
        host, timeout_s, way, has_same_weights, flushes: as in `ReceiverTransport`.
    """

    depth = DEPTH

    def __init__(
        self,
        control: EngineControl,
        local: LocalControl,
        ranks: Ranks,
        *,
        first_seed: int,
        host: str,
        timeout_s: float,
        way: Way,
        has_same_weights: bool = False,
        flushes: bool = True,
    ) -> None:
        self._control = control
        self._local = local
        self._ranks = ranks
        self._first_seed = first_seed
        self._host = host
        self._timeout_s = timeout_s
        self._way: Way = way
        self._compares = has_same_weights
        self._flushes = flushes
        self._requests = Requests(control)
        self._sender: Sender | None = None
        self._addresses: list[list[Address]] = []
        self._sync = 0
        self._bucket = 0
        self._on_way: deque[tuple[tuple[str, ...], bool]] = deque()
        self._next_probe = 0.0

    def open(self) -> None:
        """Find the engine rank of this rank's slot, and tell rank 0 where it may be led to.

        Raises:
            EngineUnavailable: an engine is dead.
            WeightSyncError: an engine has a slot without a trainer.
        """
        places: list[range] = []
        found: Address | EngineError | None
        try:
            places = self._places()
            found = self._begin(places)
        except EngineError as error:
            found = error  # all ranks have to meet first
        addresses = self._ranks.gather(found)
        for address in addresses:
            if isinstance(address, EngineError):
                raise address
        missing = [rank for place in places for rank in place if rank >= len(addresses)]
        if missing:
            raise WeightSyncError(
                f"with --colocate every engine shares its slots with training ranks, but slots {missing} have none; "
                "--rollout-num-gpus must not be above the trainer's GPUs"
            )
        self._addresses = [[addresses[rank] for rank in place] for place in places]

    def _places(self) -> list[range]:
        """The slots of each engine."""
        places: list[range] = []
        for info in self._control.get_all("/server_info", timeout_s=HEALTH_TIMEOUT_S):
            size = int(info.get("tp_size") or 1)
            first = (int(info["random_seed"]) - self._first_seed) * size
            places.append(range(first, first + size))
        return places

    def _begin(self, places: Sequence[range]) -> Address | None:
        """Where the engine rank of this rank's slot finds it; None without one."""
        for url, place in zip(self._control.urls, places, strict=True):
            if self._ranks.rank in place:
                self._local.urls = (url,)
                self._sender = Sender(
                    self._host, 1, way=self._way, timeout_s=self._timeout_s, check=self._check
                )
                return self._sender.address
        return None

    def start(self, bucket: Bucket, version: str | None = None) -> None:
        """As `WeightTransport`, for the engine rank that this rank feeds."""
        is_first = self._bucket == 0
        if is_first and self._ranks.rank == 0:
            self._requests.start(self._invitations(self._sync), flush=self._flushes)
        number, self._bucket = self._bucket, self._bucket + 1
        is_last = version is not None
        sync = self._sync
        if is_last:
            self._sync, self._bucket = self._sync + 1, 0
        if self._sender is None:
            return
        if is_first:
            self._sender.join()
        self._sender.start(bucket, sync=sync, number=number, is_last=is_last)
        self._on_way.append((bucket.names, is_last))

    def taken(self) -> Sequence[dict[str, int]]:
        """As `WeightTransport`, of the engine rank that this rank feeds."""
        if self._sender is None:
            return []
        answers = self._sender.taken()
        names, is_last = self._on_way.popleft()
        if is_last:
            check_unchanged(answers)
        return [sums_of(names, answers, self._local.urls[0])]

    def finish(self, version: str) -> None:
        """As `WeightTransport`."""
        self._compares = False
        if self._ranks.rank == 0:
            self._requests.end()
            self._requests.stamp(version)

    def close(self) -> None:
        """Let the engines forget this trainer."""
        if self._ranks.rank == 0 and self._addresses:
            self._requests.say_goodbye(self._invitations(LEAVE))
        if self._sender is not None:
            self._sender.close()
        self._sender = None

    def _invitations(self, sync: int) -> list[list[Invitation]]:
        return [
            [address.invitation(1, sync=sync, compare=self._compares) for address in addresses]
            for addresses in self._addresses
        ]

    def _check(self) -> None:
        """While this rank waits: rank 0 sees its requests, the others ask whether their engine lives."""
        if self._ranks.rank == 0:
            # Others' engines may be through; what went wrong in one, its own trainer rank reads.
            self._requests.check(may_have_ended=True)
            return
        if time.monotonic() < self._next_probe:
            return
        self._next_probe = time.monotonic() + PROBE_S
        probe = EngineControl(self._local.urls, timeout_s=HEALTH_TIMEOUT_S)
        try:
            probe.get_all("/model_info")
        except EngineError as error:
            raise WeightSyncError(f"weight sync failed: {error}") from error
        finally:
            probe.close()
