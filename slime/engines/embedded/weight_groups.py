"""WeightGroups: the gloo groups through which a trainer, rank 0, broadcasts new weights."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slime.engines.control_requests import DistributedUpdate, WeightsGroup
from slime.engines.rendezvous import gloo_group, joined_store, local_address
from slime.errors import WeightSyncError

# torch's stubs know little of process groups.
dist: Any = torch.distributed

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


@dataclass(frozen=True, slots=True)
class _Member:
    group: Any
    timeout: datetime.timedelta


class WeightGroups:
    """Groups this engine has joined, by name."""

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}

    def join(self, request: WeightsGroup) -> None:
        """Become a member; blocks until all members are there.

        Raises:
            WeightSyncError: a group of this name exists, or the others did not come in time.
        """
        if request.group_name in self._members:
            raise WeightSyncError(
                f"weight group {request.group_name!r} exists already; destroy it first"
            )
        timeout = datetime.timedelta(seconds=request.timeout_s)
        try:
            group = _connect(request, datetime.timedelta(seconds=request.join_timeout_s))
        except RuntimeError as error:
            raise WeightSyncError(
                f"cannot join weight group {request.group_name!r} as rank {request.rank} of "
                f"{request.world_size} at {request.master_address}:{request.master_port} within "
                f"{request.join_timeout_s:g} s: {error}"
            ) from error
        self._members[request.group_name] = _Member(group, timeout)

    def leave(self, name: str) -> bool:
        """Leave a group; returns whether there was one."""
        return self._members.pop(name, None) is not None

    def receive(self, update: DistributedUpdate) -> list[tuple[str, Tensor]]:
        """The tensors of an update, into memory of their own; blocks until rank 0 has sent all.

        Raises:
            WeightSyncError: no such group, an unknown dtype, or the broadcast failed.
        """
        member = self._members.get(update.group_name)
        if member is None:
            known = ", ".join(self._members) or "none"
            raise WeightSyncError(f"no weight group {update.group_name!r} here; joined: {known}")
        parts = [_buffer(dtype, shape) for dtype, shape in _pairs(update)]
        buffers = parts
        if update.is_flattened:
            buffers = [torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8)]
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = member.timeout
        try:
            # All at once: gloo keeps the order, and the next receives while the last one lands.
            works = [member.group.broadcast([buffer], options) for buffer in buffers]
            for work in works:
                work.wait(member.timeout)
        except RuntimeError as error:
            raise WeightSyncError(
                f"broadcast in weight group {update.group_name!r} failed: {error}"
            ) from error
        if update.is_flattened:
            _spread(buffers[0], parts)
        return [
            (name, part.view(shape))
            for name, part, shape in zip(update.names, parts, update.shapes, strict=True)
        ]


def _pairs(update: DistributedUpdate) -> Sequence[tuple[str, tuple[int, ...]]]:
    return list(zip(update.dtypes, update.shapes, strict=True))


def _spread(flat: Tensor, parts: Sequence[Tensor]) -> None:
    """Copy the bytes of `flat` into `parts`, one after the other."""
    start = 0
    for part in parts:
        part.view(torch.uint8).copy_(flat[start : start + part.nbytes])
        start += part.nbytes


def _buffer(dtype: str, shape: tuple[int, ...]) -> Tensor:
    if dtype not in _DTYPES:
        raise WeightSyncError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    return torch.empty(torch.Size(shape).numel(), dtype=_DTYPES[dtype])


def _connect(request: WeightsGroup, timeout: datetime.timedelta) -> Any:
    store = joined_store(request.master_address, request.master_port, request.world_size, timeout)
    host = local_address(request.master_address, request.master_port)
    return gloo_group(
        store, request.group_name, request.rank, request.world_size, host=host, timeout=timeout
    )
