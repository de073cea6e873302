"""Transport: how buckets of weights reach the engines. Declared here, where `sync.py` uses it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from slime.engines.strips import strips_of


@dataclass(frozen=True)
class Bucket:
    """Some named tensors that travel together.

    Attributes:
        names: Hugging Face names.
        tensors: whole tensors, in the order of `names`.
        num_bytes: their size.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    num_bytes: int

    @cached_property
    def strips(self) -> list[Tensor]:
        """The tensors' bytes, [n, num_bytes] uint8 for each n of them that follow each other in memory."""
        return strips_of(self.tensors)


class WeightTransport(Protocol):
    """Moves buckets from the sending trainer rank into every engine, in their order.

    Attributes:
        depth: buckets that may be on their way at once: started, and not yet taken.
    """

    depth: int

    def open(self) -> None:
        """Connect to the engines; raises WeightSyncError when one does not join in time."""
        ...

    def start(self, bucket: Bucket, version: str | None = None) -> None:
        """Put a bucket on its way; its tensors may change once this returns.

        Args:
            version: given with the last bucket: from now on the engines have these weights whole.
        """
        ...

    def taken(self) -> Sequence[dict[str, int]]:
        """Wait until every engine has loaded the first bucket on its way.

        Per engine, the checksum of each loaded parameter by name.
        """
        ...

    def finish(self, version: str) -> None:
        """Called when all buckets are verified: the engines may say that they have `version`."""
        ...

    def close(self) -> None:
        """Leave the engines."""
        ...
