"""One trainer rank's side of a weight sync with ranks of SGLang servers: bytes out, answers in.

The other side is `engines/sglang/receiver.py`. Who is asked to take part, and through which request, is
the transports' business: `receiver.py`, `local.py`.
"""

import base64
import datetime
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slime.engines.rendezvous import listening_store, reserve_port
from slime.engines.sglang.invitation import (
    Invitation,
    Way,
    answer_key,
    bucket_key,
    join_key,
    layout_key,
)
from slime.engines.sglang.layout import Layout
from slime.engines.sglang.receiver import broadcast_options, make_group
from slime.engines.strips import copy_all
from slime.errors import WeightSyncError
from slime.weights.transport import Bucket

POLL_S = 0.0005
# How often a waiting sender asks whether the engines are still at it.
CHECK_S = 0.05

# Buckets on their way at once: one is filled while receivers load the one before.
DEPTH = 2

_numbers = itertools.count()


@dataclass(frozen=True)
class Address:
    """Where receivers meet a sender.

    Attributes:
        group: a name that no other sender has.
        num_receivers: ranks it sends to.
    """

    host: str
    port: int
    group: str
    way: Way
    num_receivers: int
    timeout_s: float

    def invitation(self, rank: int, *, sync: int, compare: bool) -> Invitation:
        """To receiver `rank`, 1 being the first."""
        return Invitation(
            host=self.host,
            port=self.port,
            group=self.group,
            rank=rank,
            world_size=self.num_receivers + 1,
            way=self.way,
            sync=sync,
            compare=compare,
            timeout_s=self.timeout_s,
        )


@dataclass
class _Buffer:
    """Memory that buckets are packed into, one after the other."""

    content: Tensor
    handle: str


@dataclass(frozen=True)
class _OnWay:
    """A bucket that receivers have not all taken; `work` is its broadcast, if it travels so."""

    sync: int
    number: int
    is_last: bool
    work: Any


class Sender:
    """Sends buckets to receivers that were invited, and collects what they took.

    At most `DEPTH` buckets are on their way.

    Args:
        host: address of this process that the receivers can reach.
        num_receivers: ranks of engines.
        way: how bytes travel: "gloo" between CPUs, "nccl" to other cards, "ipc" to this process's own card.
        timeout_s: deadline of each wait, seconds.
        check: called while it waits; raises when there is nothing to wait for any more.
    """

    def __init__(
        self,
        host: str,
        num_receivers: int,
        *,
        way: Way,
        timeout_s: float,
        check: Callable[[], None],
    ) -> None:
        name = f"slime-weights-{time.time_ns()}-{next(_numbers)}"
        self.address = Address(host, reserve_port(host), name, way, num_receivers, timeout_s)
        timeout = datetime.timedelta(seconds=timeout_s)
        self._store: Any = listening_store(host, self.address.port, num_receivers + 1, timeout)
        self._check = check
        self._group: Any = None
        self._has_joined = False
        self._buffers: dict[int, _Buffer] = {}
        self._layouts: dict[Layout, tuple[int, Layout]] = {}
        self._on_way: deque[_OnWay] = deque()

    def join(self) -> None:
        """Wait until every receiver is there, at the first sync.

        Raises:
            WeightSyncError: one is missing at the deadline, or `check` says that it will not come.
        """
        if self._has_joined:
            return
        self._await([join_key(rank) for rank in self._receivers], "an engine did not join")
        if self.address.way != "ipc":
            try:
                invitation = self.address.invitation(0, sync=0, compare=False)
                self._group = make_group(invitation, self._store)
            except RuntimeError as error:
                raise WeightSyncError(
                    f"weight sync failed: the group of {self.address.num_receivers + 1} members did not form: "
                    f"{error}; see the engines' logs in the run folder"
                ) from error
        self._has_joined = True

    def start(self, bucket: Bucket, *, sync: int, number: int, is_last: bool) -> None:
        """Put a bucket on its way to every receiver.

        Raises:
            WeightSyncError: the broadcast could not begin.
        """
        assert len(self._on_way) < DEPTH, "the buffer of this bucket is in use"
        place, layout = self._told(Layout.of(bucket.names, bucket.tensors))
        buffer, flat = self._filled(bucket, layout, number % DEPTH)
        content = {"layout": place, "handle": buffer.handle, "is_last": is_last}
        self._store.set(bucket_key(sync, number), json.dumps(content))
        work = None
        if self._group is not None:
            with self._broadcasting():
                work = self._group.broadcast([flat], broadcast_options())
        self._on_way.append(_OnWay(sync, number, is_last, work))

    def taken(self) -> list[dict[str, Any]]:
        """What each receiver answered to the first bucket on its way, in the order of ranks.

        Raises:
            WeightSyncError: one could not take it, or did not in time.
        """
        bucket = self._on_way.popleft()
        if bucket.work is not None:
            with self._broadcasting():
                bucket.work.wait()
        answers = self._answers(bucket.sync, bucket.number)
        self._store.delete_key(bucket_key(bucket.sync, bucket.number))
        if bucket.is_last and self.address.way == "ipc":  # the engines need the memory
            self._buffers.clear()
            torch.cuda.ipc_collect()
        return answers

    @contextmanager
    def _broadcasting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._check()
            raise WeightSyncError(f"weight sync failed: a broadcast failed: {error}") from error

    def close(self) -> None:
        """Leave the group and the store."""
        self._group = self._store = None
        self._buffers.clear()
        self._on_way.clear()

    @property
    def _receivers(self) -> range:
        return range(1, self.address.num_receivers + 1)

    def _told(self, layout: Layout) -> tuple[int, Layout]:
        """The number by which receivers know this layout, of which they are told once, and what was told."""
        known = self._layouts.get(layout)
        if known is None:
            known = self._layouts[layout] = len(self._layouts), layout
            self._store.set(layout_key(known[0]), layout.text())
        return known

    def _filled(self, bucket: Bucket, layout: Layout, place: int) -> tuple[_Buffer, Tensor]:
        """A buffer that is kept from bucket to bucket, and [num_bytes] uint8 of the bucket in it."""
        num_bytes = layout.num_bytes
        way = self.address.way
        device = "cpu" if way == "gloo" else torch.device("cuda", torch.cuda.current_device())
        buffer = self._buffers.get(place)
        if buffer is None or buffer.content.numel() < num_bytes:
            content = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            handle = shared_handle(content) if way == "ipc" else ""
            buffer = self._buffers[place] = _Buffer(content, handle)
        flat = buffer.content[:num_bytes]
        strips = bucket.strips
        copy_all(layout.strips(flat, [len(strip) for strip in strips]), strips)
        if way == "ipc":  # the receivers' streams do not wait for ours
            torch.cuda.current_stream().synchronize()
        return buffer, flat

    def _answers(self, sync: int, number: int) -> list[dict[str, Any]]:
        keys = [answer_key(sync, number, rank) for rank in self._receivers]
        self._await(keys, f"bucket {number} was not taken")
        answers: list[dict[str, Any]] = []
        for rank, key in enumerate(keys, 1):
            answer: dict[str, Any] = json.loads(self._store.get(key))
            self._store.delete_key(key)
            if error := answer.get("error"):
                raise WeightSyncError(
                    f"weight sync failed: receiver {rank} of {len(keys)} could not take bucket {number}: "
                    f"{error}. The engines stay paused; their logs in the run folder tell more."
                )
            answers.append(answer)
        return answers

    def _await(self, keys: Sequence[str], otherwise: str) -> None:
        """Until the receivers have written all of these."""
        deadline = time.monotonic() + self.address.timeout_s
        next_check = time.monotonic() + CHECK_S
        while not self._store.check(list(keys)):
            now = time.monotonic()
            if now > next_check:
                next_check = now + CHECK_S
                try:
                    self._check()
                except WeightSyncError:
                    if self._store.check(list(keys)):  # its last words came first
                        return
                    raise
            if now > deadline:
                raise WeightSyncError(
                    f"weight sync failed: {otherwise} within {self.address.timeout_s:.0f} s; see the "
                    "engines' logs in the run folder"
                )
            time.sleep(POLL_S)


def shared_handle(buffer: Tensor) -> str:
    """JSON by which another process opens this allocation of the card."""
    storage: Any = buffer.untyped_storage()
    shared = storage._share_cuda_()
    words = [base64.b64encode(x).decode() if isinstance(x, bytes) else x for x in shared]
    return json.dumps(words)
