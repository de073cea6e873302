"""Weights to SGLang servers that run our receiver: the trainer's side of `engines/sglang/receiver.py`.

One request per engine and sync; buckets and answers go through a store and a process group of our own,
or through memory of the card that both sides share.
"""

import base64
import datetime
import itertools
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any

import torch
from torch import Tensor

from slime.engines.control import Answer, EngineControl, collect
from slime.engines.rendezvous import listening_store
from slime.engines.servers import free_port
from slime.engines.sglang.invitation import (
    Invitation,
    Way,
    answer_key,
    bucket_key,
    join_key,
    places,
)
from slime.engines.sglang.receiver import PATH, broadcast_options, make_group
from slime.errors import EngineError, WeightSyncError
from slime.weights.transport import Bucket

HEALTH_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0
POLL_S = 0.0005
# An engine's own calls, which it sends while a rank takes weights, are looked at this often.
LOOK_AT_CALLS_S = 0.05

_numbers = itertools.count()


class ReceiverTransport:
    """Weights to every rank of stock SGLang servers whose --custom-weight-loader is our receiver.

    Args:
        control: the engines.
        host: address of this process that the engines can reach.
        timeout_s: deadline of each wait, seconds.
        way: how bytes travel: "gloo" between CPUs, "nccl" to other cards, "ipc" to engines on this
            process's own card.
        has_same_weights: the engines loaded the weights that the first sync brings, from the same
            files: it must change no bit of their own parameters. This proves that what an engine
            makes of tensors that arrive is what it makes of a checkpoint.
    """

    def __init__(
        self,
        control: EngineControl,
        *,
        host: str,
        timeout_s: float,
        way: Way,
        has_same_weights: bool = False,
    ) -> None:
        self._control = control
        self._host = host
        self._timeout_s = timeout_s
        self._way: Way = way
        self._name = f"slime-weights-{time.time_ns()}-{next(_numbers)}"
        self._store: Any = None
        self._group: Any = None
        self._ranks: list[range] = []
        self._port = 0
        self._sync = -1
        self._bucket = 0
        self._calls: list[Future[Answer]] = []
        self._buffer: Tensor | None = None
        self._handle = ""
        self._compares = has_same_weights

    def open(self) -> None:
        """Find out who takes part; each rank joins with the first bucket, while its engine is paused.

        Raises:
            EngineUnavailable: an engine is dead.
        """
        infos = self._control.get_all("/server_info", timeout_s=HEALTH_TIMEOUT_S)
        first = 1
        for info in infos:
            size = int(info.get("tp_size") or 1)
            self._ranks.append(range(first, first + size))
            first += size
        self._port = free_port(self._host)
        timeout = datetime.timedelta(seconds=self._timeout_s)
        self._store = listening_store(self._host, self._port, first, timeout)

    @property
    def _world_size(self) -> int:
        return self._ranks[-1].stop

    @property
    def _receivers(self) -> range:
        return range(1, self._world_size)

    def send(self, bucket: Bucket, version: str | None = None) -> Sequence[dict[str, int]]:
        """As `WeightTransport`.

        Raises:
            WeightSyncError: also when the first sync changed parameters it must not change.
        """
        if self._store is None:
            raise WeightSyncError("the transport is not open; call open() first")
        if not self._calls:
            self._begin()
        flat = self._filled(bucket)
        content = {
            "names": bucket.names,
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.tensors],
            "shapes": [list(tensor.shape) for tensor in bucket.tensors],
            "num_bytes": flat.numel(),
            "handle": self._handle,
            "is_last": version is not None,
        }
        self._store.set(bucket_key(self._sync, self._bucket), json.dumps(content))
        if self._way != "ipc":
            self._broadcast(flat)
        answers = self._answers()
        self._bucket += 1
        if version is not None:
            self._end(version, answers)
        return [dict(zip(bucket.names, sums, strict=True)) for sums in self._sums(answers)]

    def close(self) -> None:
        """Tell the ranks to forget this trainer; those that are gone are no error."""
        if self._store is not None and self._ranks:
            wait(self._invite(sync=-1), timeout=CLOSE_TIMEOUT_S)
        self._group = self._store = self._buffer = None

    def _begin(self) -> None:
        self._sync += 1
        self._bucket = 0
        self._calls = self._invite(self._sync)
        if self._sync == 0:
            self._await([join_key(rank) for rank in self._receivers], "an engine did not join")
        if self._group is None and self._way != "ipc":
            try:
                self._group = make_group(self._invitation(0, self._sync), self._store)
            except RuntimeError as error:
                self._fail(f"the weight group of {self._world_size} members did not form: {error}")

    def _invite(self, sync: int) -> list["Future[Answer]"]:
        def body(engine: int) -> Answer:
            invitations = [self._invitation(rank, sync) for rank in self._ranks[engine]]
            payloads = [invitation.payload() for invitation in invitations]
            return {
                "serialized_named_tensors": [base64.b64encode(p).decode() for p in payloads],
                "load_format": PATH,
                "flush_cache": sync >= 0,
            }

        return self._control.start_post_all("/update_weights_from_tensor", body)

    def _invitation(self, rank: int, sync: int) -> Invitation:
        return Invitation(
            host=self._host,
            port=self._port,
            group=self._name,
            rank=rank,
            world_size=self._world_size,
            way=self._way,
            sync=sync,
            compare=self._compares,
            timeout_s=self._timeout_s,
        )

    def _filled(self, bucket: Bucket) -> Tensor:
        """[num_bytes] uint8 of the bucket, in memory that is kept from bucket to bucket."""
        starts, num_bytes = places([tensor.nbytes for tensor in bucket.tensors])
        device = "cpu" if self._way == "gloo" else torch.device("cuda", torch.cuda.current_device())
        if self._buffer is None or self._buffer.numel() < num_bytes:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._handle = shared_handle(self._buffer) if self._way == "ipc" else ""
        flat = self._buffer[:num_bytes]
        for start, tensor in zip(starts, bucket.tensors, strict=True):
            data = tensor.detach().contiguous().view(-1).view(torch.uint8)
            flat[start : start + data.numel()].copy_(data)
        if flat.is_cuda:
            torch.cuda.current_stream().synchronize()
        return flat

    def _broadcast(self, flat: Tensor) -> None:
        try:
            self._group.broadcast([flat], broadcast_options()).wait()
        except RuntimeError as error:
            self._fail(f"a broadcast failed: {error}")

    def _answers(self) -> list[dict[str, Any]]:
        """What each rank of all engines took, in the order of ranks."""
        keys = [answer_key(self._sync, self._bucket, rank) for rank in self._receivers]
        self._await(keys, f"bucket {self._bucket} was not taken")
        answers: list[dict[str, Any]] = []
        for rank, key in enumerate(keys, 1):
            answer = json.loads(self._store.get(key))
            self._store.delete_key(key)
            if error := answer.get("error"):
                self._fail(f"{self._engine_of(rank)} could not take bucket {self._bucket}: {error}")
            answers.append(answer)
        self._store.delete_key(bucket_key(self._sync, self._bucket))
        return answers

    def _await(self, keys: list[str], otherwise: str) -> None:
        """Until the ranks have written all of these, or an engine ended its call before that."""
        deadline = time.monotonic() + self._timeout_s
        next_look = time.monotonic() + LOOK_AT_CALLS_S
        while not self._store.check(keys):
            now = time.monotonic()
            if now > next_look:
                next_look = now + LOOK_AT_CALLS_S
                if any(call.done() for call in self._calls) and not self._store.check(keys):
                    self._fail(f"{otherwise}: it ended its part early")
            if now > deadline:
                self._fail(f"{otherwise} within {self._timeout_s:.0f} s")
            time.sleep(POLL_S)

    def _sums(self, answers: list[dict[str, Any]]) -> list[list[int]]:
        """Checksums of each engine; all ranks of one must have taken the same.

        Raises:
            WeightSyncError: two ranks of an engine took different bytes.
        """
        sums: list[list[int]] = []
        for engine, ranks in enumerate(self._ranks):
            taken = [answers[rank - 1]["sums"] for rank in ranks]
            if any(one != taken[0] for one in taken):
                raise WeightSyncError(
                    f"the tensor-parallel ranks of {self._control.urls[engine]} took different "
                    "weights. The engines stay paused; restart the run from its last checkpoint."
                )
            sums.append(taken[0])
        return sums

    def _end(self, version: str, answers: list[dict[str, Any]]) -> None:
        calls, self._calls = self._calls, []
        self._raise_engine_error(calls)
        changed = sorted({name for answer in answers for name in answer["changed"] or ()})
        if changed:
            raise WeightSyncError(
                f"the first sync brings the weights that the engines loaded from --hf-checkpoint, but changed "
                f"{len(changed)} of their parameters: {', '.join(changed[:8])}. SGLang loads this model from "
                "tensors in another way than from files; report this with the model's config.json."
            )
        self._compares = False
        if self._way == "ipc":  # the engines need the memory
            self._buffer = None
            torch.cuda.ipc_collect()
        self._control.post_all(
            "/update_weight_version", {"new_version": version, "abort_all_requests": False}
        )

    def _engine_of(self, rank: int) -> str:
        engine = next(i for i, ranks in enumerate(self._ranks) if rank in ranks)
        return f"{self._control.urls[engine]} (rank {rank - self._ranks[engine].start})"

    def _fail(self, otherwise: str) -> None:
        """Raise what the engines said, which tells more than a broken collective."""
        calls, self._calls = self._calls, []
        done = [call for call in calls if call.done()]
        self._raise_engine_error(done)
        raise WeightSyncError(
            f"weight sync failed: {otherwise}; see the engines' logs in the run folder"
        )

    def _raise_engine_error(self, calls: Sequence["Future[Answer]"]) -> None:
        try:
            collect(calls)
        except EngineError as error:
            raise WeightSyncError(f"weight sync failed: {error}") from error


def shared_handle(buffer: Tensor) -> str:
    """JSON by which another process opens this allocation of the card."""
    storage: Any = buffer.untyped_storage()
    shared = storage._share_cuda_()
    words = [base64.b64encode(x).decode() if isinstance(x, bytes) else x for x in shared]
    return json.dumps(words)
