"""Weights to CPU engines over a gloo group: the trainer is rank 0, engine i is rank i + 1."""

import datetime
import itertools
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.engines.control import Answer, EngineControl, collect
from slime.engines.control_requests import FLATTENED
from slime.engines.rendezvous import gloo_group, listening_store, reserve_port
from slime.errors import EngineError, WeightSyncError
from slime.weights.transport import Bucket

# Engines join idle: one that has not come after this long has died on the way.
JOIN_TIMEOUT_S = 30.0
# An engine that lives answers /health at once, whatever it computes.
HEALTH_TIMEOUT_S = 10.0
# How long leaving a group may take: members may be dead, or hang.
CLOSE_TIMEOUT_S = 5.0

# A group that broke half-way may still be known to some engines: no name is used twice.
_numbers = itertools.count()


class GlooTransport:
    """Broadcast over torch's own gloo process group, apart from the trainer's default group.

    One bucket at a time: its request is what lets an engine take part in the broadcast.

    Args:
        control: the engines.
        host: address of this process that the engines can reach.
        timeout_s: deadline of joining and of each broadcast, seconds.
        group_name: names the group on both sides.
    """

    depth = 1

    def __init__(
        self,
        control: EngineControl,
        *,
        host: str,
        timeout_s: float,
        group_name: str = "slime-weights",
    ) -> None:
        self._control = control
        self._host = host
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._join_timeout = datetime.timedelta(seconds=min(timeout_s, JOIN_TIMEOUT_S))
        self._group_name = f"{group_name}-{next(_numbers)}"
        self._group: Any = None
        self._loads: list[Future[Answer]] = []

    def open(self) -> None:
        """Connect to the engines.

        Raises:
            EngineUnavailable: an engine is dead already.
            WeightSyncError: an engine refused or did not join within the deadline.
        """
        # The others would wait for a dead one until the deadline of joining, and we with them.
        self._control.get_all("/health", timeout_s=HEALTH_TIMEOUT_S)
        port = reserve_port(self._host)
        world_size = len(self._control.urls) + 1
        joins = self._control.start_post_all(
            "/init_weights_update_group",
            lambda engine: {
                "master_address": self._host,
                "master_port": port,
                "rank_offset": engine + 1,
                "world_size": world_size,
                "group_name": self._group_name,
                "backend": "gloo",
                "timeout_s": self._timeout.total_seconds(),
                "join_timeout_s": self._join_timeout.total_seconds(),
            },
        )
        try:
            self._group = make_gloo_group(
                self._host, port, world_size, self._group_name, self._join_timeout
            )
        except RuntimeError as error:
            _raise_engine_error(
                joins, f"the weight group of {world_size} members did not form: {error}"
            )
        _raise_engine_error(joins)

    def start(self, bucket: Bucket, version: str | None = None) -> None:
        """As `WeightTransport`."""
        if self._group is None:
            raise WeightSyncError("the weight group is not open; call open() first")
        payload = {
            "names": list(bucket.names),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.tensors],
            "shapes": [list(tensor.shape) for tensor in bucket.tensors],
            "group_name": self._group_name,
            # One broadcast per bucket: 25 small ones took 35 ms, this takes 3.
            "load_format": FLATTENED,
            "flush_cache": True,
            # The engine stamps it in this call: one of its own would cost every sync 5 ms.
            "weight_version": version,
        }
        loads = self._loads = self._control.start_post_all(
            "/update_weights_from_distributed", payload
        )
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = self._timeout
        try:
            self._group.broadcast([flattened(bucket)], options).wait(self._timeout)
        except RuntimeError as error:
            # Closes our sockets: engines that are alive would wait for us until their deadline.
            self._group = None
            _raise_engine_error(
                loads, f"broadcast of {bucket.names[0]} … {bucket.names[-1]} failed: {error}"
            )

    def taken(self) -> Sequence[dict[str, int]]:
        """As `WeightTransport`."""
        _raise_engine_error(self._loads)
        return [load.result()["checksums"] for load in self._loads]

    def finish(self, version: str) -> None:
        """Nothing: the last bucket stamped the version."""

    def close(self) -> None:
        """Leave the group; engines that are gone already, or hang, are no error."""
        self._group = None
        leaves = self._control.start_post_all(
            "/destroy_weights_update_group", {"group_name": self._group_name}
        )
        wait(leaves, timeout=CLOSE_TIMEOUT_S)


def flattened(bucket: Bucket) -> Tensor:
    """[num_bytes] uint8 on the CPU: the tensors' bytes, one after the other."""
    flats = [tensor.detach().to("cpu").contiguous().view(-1) for tensor in bucket.tensors]
    return torch.cat([flat.view(torch.uint8) for flat in flats])


def make_gloo_group(
    host: str, port: int, world_size: int, group_name: str, timeout: datetime.timedelta
) -> Any:
    """The trainer's place, rank 0, in a gloo group independent of torch's default group.

    Raises:
        RuntimeError: a member is missing after `timeout`.
    """
    store = listening_store(host, port, world_size, timeout)
    return gloo_group(store, group_name, 0, world_size, host=host, timeout=timeout)


def _raise_engine_error(calls: Sequence["Future[Answer]"], otherwise: str | None = None) -> None:
    """Raise what the engines said, which tells more than the broken collective does."""
    try:
        collect(calls)
    except EngineError as error:
        raise WeightSyncError(f"weight sync failed: {error}") from error
    if otherwise is not None:
        raise WeightSyncError(
            f"weight sync failed: {otherwise}; see the engines' logs in the run folder"
        )
