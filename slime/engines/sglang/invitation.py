"""What a trainer tells a rank of an SGLang server to take part in a weight sync.

It travels as the one tensor of a stock /update_weights_from_tensor request. All else (names and shapes,
what arrived, errors) goes through a store of torch's that the trainer listens at.
"""

import base64
import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

# How the bytes travel: broadcast over a process group, a CUDA allocation of the trainer's that the
# engine opens, both on one card, or files that the engine has loaded and is to check (file_check.py).
Way = Literal["gloo", "nccl", "ipc", "file"]
# Instead of the number of a sync: leave the group; note the checksums of the weights as they are.
LEAVE, NOTE = -1, -2
# What SGLang calls with an invitation: the dotted path for --custom-weight-loader.
RECEIVER = "slime.engines.sglang.receiver.receive"


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """One rank's part in one sync.

    Attributes:
        host, port: of the store.
        group: name of the members; a rank that knows it keeps its connection.
        rank, world_size: this rank's place; the trainer is 0.
        sync: number of the sync within the group, or LEAVE or NOTE.
        compare: empty the engine's own parameters first, and report which of them this sync does
            not bring back as they were, or as they were noted.
        timeout_s: deadline of each wait, seconds.
    """

    host: str
    port: int
    group: str
    rank: int
    world_size: int
    way: Way
    sync: int
    compare: bool
    timeout_s: float

    def payload(self) -> bytes:
        """A pickle of `[("slime", tensor)]` as SGLang reads it.

        The tensor is in it by value: SGLang's own pickler would share memory with this host.
        """
        return pickle.dumps([("slime", _AsTensor(json.dumps(asdict(self))))])

    @classmethod
    def read(cls, tensor: Tensor) -> Self:
        """The invitation in a tensor of `payload`."""
        fields: dict[str, Any] = json.loads(tensor.cpu().to(torch.uint8).numpy().tobytes())
        return cls(**fields)


class _AsTensor:
    """Is unpickled as the tensor of its text's bytes, a number each."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.Tensor, (list(self._text.encode()),)


def note(rank: int) -> Invitation:
    """To note the checksums of rank `rank`'s own weights, before they lose their memory.

    Once they have it again they hold what happens to be there; the first sync could not be compared.
    """
    return Invitation(
        host="",
        port=0,
        group="",
        rank=rank,
        world_size=0,
        way="gloo",
        sync=NOTE,
        compare=False,
        timeout_s=0.0,
    )


def request(invitations: Sequence[Invitation], *, flush: bool) -> dict[str, Any]:
    """Body of /update_weights_from_tensor that brings one to each rank of an engine, in their order.

    Args:
        flush: forget what was cached of prompts.
    """
    payloads = [invitation.payload() for invitation in invitations]
    return {
        "serialized_named_tensors": [base64.b64encode(p).decode() for p in payloads],
        "load_format": RECEIVER,
        "flush_cache": flush,
    }


def join_key(rank: int) -> str:
    """Where a rank says that it is there, and about to join the group."""
    return f"joins/{rank}"


def bucket_key(sync: int, number: int) -> str:
    """Where the trainer says that a bucket comes, and which layout it has."""
    return f"{sync}/{number}/bucket"


def layout_key(number: int) -> str:
    """Where the trainer says once what buckets of a layout hold."""
    return f"layouts/{number}"


def answer_key(sync: int, number: int, rank: int) -> str:
    """Where a rank says what it took from a bucket, or why it could not."""
    return f"{sync}/{number}/taken/{rank}"
