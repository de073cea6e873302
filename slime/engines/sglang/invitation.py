"""What a trainer tells a rank of an SGLang server to take part in a weight sync.

It travels as the one tensor of a stock /update_weights_from_tensor request. All else (names and shapes,
what arrived, errors) goes through a store of torch's that the trainer listens at.
"""

import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

# How the bytes travel: broadcast over a process group, or a CUDA allocation of the trainer's that
# the engine opens, both on one card.
Way = Literal["gloo", "nccl", "ipc"]
_ALIGNMENT = 256


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """One rank's part in one sync.

    Attributes:
        host, port: of the store.
        group: name of the members; a rank that knows it keeps its connection.
        rank, world_size: this rank's place; the trainer is 0.
        sync: number of the sync within the group; -1 asks the rank to leave.
        compare: empty the engine's own parameters first, and report which of them this sync does
            not bring back as they were.
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


def places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """(first byte of each of these many bytes in a bucket, bytes of the bucket).

    Each begins where tensors of any dtype may.
    """
    starts: list[int] = []
    end = 0
    for size in sizes:
        starts.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def join_key(rank: int) -> str:
    """Where a rank says that it is there, and about to join the group."""
    return f"joins/{rank}"


def bucket_key(sync: int, number: int) -> str:
    """Where the trainer says what is in a bucket."""
    return f"{sync}/{number}/bucket"


def answer_key(sync: int, number: int, rank: int) -> str:
    """Where a rank says what it took from a bucket, or why it could not."""
    return f"{sync}/{number}/taken/{rank}"
