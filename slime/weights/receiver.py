"""Weights from one trainer rank to every rank of SGLang servers that run our receiver.

One request per engine and sync; buckets and answers go through a store and a process group of our own.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any

from slime.engines.control import Answer, EngineControl, collect
from slime.engines.sglang.invitation import LEAVE, Invitation, Way, request
from slime.errors import EngineError, WeightSyncError
from slime.weights.sender import DEPTH, Sender
from slime.weights.transport import Bucket

HEALTH_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0


class ReceiverTransport:
    """From this process to stock SGLang servers whose --custom-weight-loader is our receiver.

    Args:
        control: the engines.
        host: address of this process that the engines can reach.
        timeout_s: deadline of each wait, seconds.
        way: how bytes travel, as `Sender` has it.
        has_same_weights: the engines loaded the weights that the first sync brings, from the same
            files: it must bring back every bit of their own parameters, which are emptied for it.
            This proves that what an engine makes of tensors that arrive is what it makes of a
            checkpoint, and that none of its parameters is left out.
        flushes: the engines forget what they cached; no request may be paused there.
    """

    depth = DEPTH

    def __init__(
        self,
        control: EngineControl,
        *,
        host: str,
        timeout_s: float,
        way: Way,
        has_same_weights: bool = False,
        flushes: bool = True,
    ) -> None:
        self._host = host
        self._timeout_s = timeout_s
        self._way: Way = way
        self._flushes = flushes
        self._requests = Requests(control)
        self._sender: Sender | None = None
        self._ranks: list[range] = []
        self._compares = has_same_weights
        self._sync = 0
        self._bucket = 0
        self._is_last = False
        self._on_way: deque[tuple[str, ...]] = deque()

    def open(self) -> None:
        """Find out who takes part; each rank joins with the first bucket, while its engine is paused.

        Raises:
            EngineUnavailable: an engine is dead.
        """
        first = 1
        for size in self._requests.sizes():
            self._ranks.append(range(first, first + size))
            first += size
        self._sender = Sender(
            self._host,
            first - 1,
            way=self._way,
            timeout_s=self._timeout_s,
            check=lambda: self._requests.check(may_have_ended=self._is_last),
        )

    def start(self, bucket: Bucket, version: str | None = None) -> None:
        """As `WeightTransport`."""
        if self._sender is None:
            raise WeightSyncError("the transport is not open; call open() first")
        self._is_last = is_last = version is not None
        if self._bucket == 0:
            self._requests.start(self._invitations(self._sync), flush=self._flushes)
            self._sender.join()
        self._sender.start(bucket, sync=self._sync, number=self._bucket, is_last=is_last)
        self._on_way.append(bucket.names)
        self._bucket += 1

    def taken(self) -> Sequence[dict[str, int]]:
        """As `WeightTransport`.

        Raises:
            WeightSyncError: also when the first sync left parameters other than the engines had.
        """
        assert self._sender is not None
        answers = self._sender.taken()
        names = self._on_way.popleft()
        if self._is_last and not self._on_way:
            self._requests.end()
            check_unchanged(answers)
            self._compares = False
            self._sync, self._bucket = self._sync + 1, 0
        return [
            sums_of(names, [answers[rank - 1] for rank in ranks], url)
            for ranks, url in zip(self._ranks, self._requests.urls, strict=True)
        ]

    def finish(self, version: str) -> None:
        """As `WeightTransport`."""
        self._requests.stamp(version)

    def close(self) -> None:
        """Tell the ranks to forget this trainer; those that are gone are no error."""
        if self._sender is not None:
            self._requests.say_goodbye(self._invitations(LEAVE))
            self._sender.close()
        self._sender = None

    def _invitations(self, sync: int) -> list[list[Invitation]]:
        assert self._sender is not None
        address = self._sender.address
        return [
            [address.invitation(rank, sync=sync, compare=self._compares) for rank in ranks]
            for ranks in self._ranks
        ]


class Requests:
    """The requests that carry invitations to engines, one for each, open for as long as a sync.

    Args:
        control: the engines.
    """

    def __init__(self, control: EngineControl) -> None:
        self._control = control
        self._calls: list[Future[Answer]] = []

    @property
    def urls(self) -> tuple[str, ...]:
        """The engines."""
        return self._control.urls

    def sizes(self) -> list[int]:
        """Tensor-parallel ranks of each engine; raises EngineUnavailable for a dead one."""
        infos = self._control.get_all("/server_info", timeout_s=HEALTH_TIMEOUT_S)
        return [int(info.get("tp_size") or 1) for info in infos]

    def start(self, invitations: Sequence[Sequence[Invitation]], *, flush: bool = True) -> None:
        """Invite the ranks of each engine, which then forgets what it cached if `flush`."""
        self._calls = self._invite(invitations, flush=flush)

    def check(self, *, may_have_ended: bool) -> None:
        """Nothing, while all requests are as they should be.

        Args:
            may_have_ended: an engine may be through with the sync.

        Raises:
            WeightSyncError: an engine refused, ended too early, or is gone.
        """
        done = [call for call in self._calls if call.done()]
        if done:
            _raise_engine_error(done)
        if done and not may_have_ended:
            raise WeightSyncError(
                "weight sync failed: an engine ended its part early; see its log in the run folder"
            )

    def end(self) -> None:
        """Wait for the engines' own answers."""
        calls, self._calls = self._calls, []
        _raise_engine_error(calls)

    def stamp(self, version: str) -> None:
        """Let each engine say from now on that it has these weights."""
        body = {"new_version": version, "abort_all_requests": False}
        self._control.post_all("/update_weight_version", body)

    def say_goodbye(self, invitations: Sequence[Sequence[Invitation]]) -> None:
        """Let the ranks forget a sender; engines that are gone are no error."""
        self._calls = []
        wait(self._invite(invitations, flush=False), timeout=CLOSE_TIMEOUT_S)

    def _invite(
        self, invitations: Sequence[Sequence[Invitation]], *, flush: bool
    ) -> list["Future[Answer]"]:
        def body(engine: int) -> Answer:
            return request(invitations[engine], flush=flush)

        return self._control.start_post_all("/update_weights_from_tensor", body)


def check_unchanged(answers: Sequence[dict[str, Any]]) -> None:
    """Nothing, when no receiver that compared found a change of its own parameters.

    Raises:
        WeightSyncError: names the parameters.
    """
    changed = sorted({name for answer in answers for name in answer["changed"] or ()})
    if changed:
        raise WeightSyncError(
            f"the first sync brings the weights that the engines loaded from --hf-checkpoint, but "
            f"{len(changed)} of their parameters did not come back as they were: {', '.join(changed[:8])}. "
            "SGLang loads this model from tensors in another way than from files; report this with the "
            "model's config.json."
        )


def sums_of(names: Sequence[str], answers: Sequence[dict[str, Any]], url: str) -> dict[str, int]:
    """Checksum of each tensor by name, as every rank of an engine took it.

    Raises:
        WeightSyncError: two ranks took different bytes.
    """
    taken: list[list[int]] = [answer["sums"] for answer in answers]
    if any(sums != taken[0] for sums in taken):
        raise WeightSyncError(
            f"the tensor-parallel ranks of {url} took different weights. The engines stay paused; restart "
            "the run from its last checkpoint."
        )
    return dict(zip(names, taken[0], strict=True))


def _raise_engine_error(calls: Sequence["Future[Answer]"]) -> None:
    try:
        collect(calls)
    except EngineError as error:
        raise WeightSyncError(f"weight sync failed: {error}") from error
