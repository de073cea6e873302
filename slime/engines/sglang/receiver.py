"""Takes weights inside a stock SGLang server: `receive` is what its --custom-weight-loader names.

SGLang calls it in each tensor-parallel rank, with its model, while generation is paused. One call takes
one whole sync: buckets come until the last one. What every rank took is reported by checksum; so is an
error, since an exception here would end the server.
"""

import datetime
import itertools
import json
import logging
import time
from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.engines.checksum import start_strip_checksums
from slime.engines.rendezvous import gloo_group, joined_store, local_address
from slime.engines.sglang.copies import Copies
from slime.engines.sglang.file_check import answer_check, emptied, own_checksums
from slime.engines.sglang.invitation import (
    LEAVE,
    NOTE,
    Invitation,
    answer_key,
    bucket_key,
    join_key,
    layout_key,
)
from slime.engines.sglang.layout import Layout

logger = logging.getLogger(__name__)

_members: dict[tuple[str, int], "_Member"] = {}
# Checksums of the engine's own parameters from before they lost their memory.
_noted: dict[str, int] = {}


def receive(model: torch.nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Take one sync's weights into `model`; never raises.

    Args:
        named_tensors: one pair, whose tensor is an invitation.
    """
    number, member, invitation = 0, None, None
    try:
        invitation = Invitation.read(named_tensors[0][1])
        if invitation.way == "file":
            answer_check(model, invitation)
            return
        place = (invitation.group, invitation.rank)
        if invitation.sync == LEAVE:
            _members.pop(place, None)
            return
        if invitation.sync == NOTE:
            _noted.update(own_checksums(model))
            return
        member = _members.get(place) or _Member(invitation)
        _members[place] = member
        before = _emptied(model) if invitation.compare else None
        seconds = {"waiting": 0.0, "loading": 0.0, "checksums": 0.0}
        last = time.perf_counter()
        member.copies.begin(model)
        for bucket in member.buckets(invitation.sync):
            last = _add(seconds, "waiting", last)
            member.copies.load(model, number, bucket.layout, bucket.flat)
            last = _add(seconds, "loading", last)
            # On CUDA this waits for the loads too: the trainer may use its buffer again then.
            sums = start_strip_checksums(bucket.layout.strips(bucket.flat)).numbers()
            last = _add(seconds, "checksums", last)
            changed = None
            if bucket.is_last and before is not None:
                after = own_checksums(model)
                changed = [name for name, value in after.items() if before[name] != value]
            member.answer(invitation.sync, number, {"sums": sums, "changed": changed})
            number += 1
        parts = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items())
        logger.info("slime's weights: %d buckets; %s", number, parts)
    except Exception as error:
        logger.exception("slime's weights could not be taken")
        if member is not None and invitation is not None:
            member.answer(invitation.sync, number, {"error": f"{type(error).__name__}: {error}"})


def _add(seconds: dict[str, float], part: str, since: float) -> float:
    """Add the time since then to a part; the time now."""
    now = time.perf_counter()
    seconds[part] += now - since
    return now


class _Member:
    """This rank's place among those that get weights from one trainer."""

    def __init__(self, invitation: Invitation) -> None:
        timeout = datetime.timedelta(seconds=invitation.timeout_s)
        store = joined_store(invitation.host, invitation.port, invitation.world_size, timeout)
        self._store = store
        self._rank = invitation.rank
        store.set(join_key(invitation.rank), "")
        self._group = make_group(invitation, store)
        self.copies = Copies()
        # The trainer's allocations that are open here, by their handles; none between syncs.
        self._opened: dict[str, Tensor] = {}
        self._layouts: dict[int, Layout] = {}

    def buckets(self, sync: int) -> Iterator["_Arrived"]:
        """Those of a sync; while one is loaded, the next is on its way."""
        try:
            coming = self._arriving(sync, 0)
            for number in itertools.count(1):
                bucket = coming
                if not bucket.is_last:
                    coming = self._arriving(sync, number)
                if bucket.work is not None:
                    bucket.work.wait()
                yield bucket
                if bucket.is_last:
                    break
        finally:
            self._opened.clear()

    def answer(self, sync: int, number: int, content: dict[str, Any]) -> None:
        """Report on a bucket."""
        self._store.set(answer_key(sync, number, self._rank), json.dumps(content))

    def _arriving(self, sync: int, number: int) -> "_Arrived":
        """A bucket, once it was announced; its bytes may still be on their way."""
        content: dict[str, Any] = json.loads(self._store.get(bucket_key(sync, number)))
        is_last, layout = bool(content["is_last"]), self._layout(content["layout"])
        num_bytes = layout.num_bytes
        if handle := content["handle"]:
            if handle not in self._opened:
                self._opened[handle] = _open_handle(handle)
            return _Arrived(layout, is_last, self._opened[handle][:num_bytes], None)
        assert self._group is not None
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        work = self._group.broadcast([flat], broadcast_options())
        return _Arrived(layout, is_last, flat, work)

    def _layout(self, number: int) -> Layout:
        """What a bucket of this layout holds; the trainer tells it once."""
        if number not in self._layouts:
            self._layouts[number] = Layout.read(self._store.get(layout_key(number)))
        return self._layouts[number]


@dataclass(frozen=True)
class _Arrived:
    """A bucket: [num_bytes] uint8 on this rank's device, what brings them; `is_last` ends the sync."""

    layout: Layout
    is_last: bool
    flat: Tensor
    work: Any


def make_group(invitation: Invitation, store: Any) -> Any:
    """This rank's place in the process group of the sync; None when bytes travel otherwise.

    Raises:
        RuntimeError: a member is missing at the deadline.
    """
    c10d: Any = dist  # torch exports no types of these
    timeout = datetime.timedelta(seconds=invitation.timeout_s)
    rank, world_size = invitation.rank, invitation.world_size
    if invitation.way == "gloo":
        host = local_address(invitation.host, invitation.port)
        return gloo_group(store, invitation.group, rank, world_size, host=host, timeout=timeout)
    if invitation.way == "nccl":
        prefixed = c10d.PrefixStore(invitation.group, store)
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return c10d.ProcessGroupNCCL(prefixed, rank, world_size, options)
    return None


def broadcast_options() -> Any:
    """From the trainer, rank 0."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return options


def _open_handle(handle: str) -> Tensor:
    """[num_bytes] uint8: the trainer's allocation on this card."""
    shared: list[Any] = json.loads(handle)
    for place in _BYTES_IN_HANDLE:
        shared[place] = b64decode(shared[place])
    shared[0] = torch.cuda.current_device()  # the trainer counts cards in its own way
    storage: Any = torch.UntypedStorage
    return torch.tensor([], dtype=torch.uint8, device="cuda").set_(
        storage._new_shared_cuda(*shared)
    )


# Of `UntypedStorage._share_cuda_`: the handles of the memory, of torch's counter of readers and of
# its event.
_BYTES_IN_HANDLE = (1, 4, 6)


def _emptied(model: torch.nn.Module) -> dict[str, int]:
    """As `emptied`; the checksums as they were noted, if they were."""
    noted, sums = dict(_noted), emptied(model)
    _noted.clear()
    return noted or sums
