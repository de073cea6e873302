"""Processes that work on one checkpoint together."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """This process among those that convert one checkpoint together, on one file system.

    Attributes:
        barrier: waits for all of them.
    """

    rank: int = 0
    size: int = 1
    barrier: Callable[[], None] = lambda: None
