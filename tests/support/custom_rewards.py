"""Reward functions as users write them, good and bad; loaded by their dotted paths."""

import asyncio
import threading
import time
from typing import Any

from slime.data.sample import Sample


async def length(args: Any, sample: Sample) -> float:
    return len(sample.response)


async def length_or_lengths(args: Any, samples: Sample | list[Sample]) -> float | list[float]:
    if isinstance(samples, list):
        return [len(sample.response) / len(samples) for sample in samples]
    return len(samples.response)


def plain(args: Any, sample: Sample) -> float:
    assert threading.current_thread() is not threading.main_thread()
    return 0.25


async def raises(args: Any, sample: Sample) -> float:
    raise KeyError("judge")


async def hangs(args: Any, sample: Sample) -> float:
    await asyncio.sleep(3600)
    return 1.0


def hangs_plainly(args: Any, sample: Sample) -> float:
    time.sleep(0.5)
    return 1.0


async def as_told(args: Any, sample: Sample) -> Any:
    return sample.metadata["told"]


async def all_as_told(args: Any, samples: list[Sample]) -> Any:
    return [sample.metadata["told"] for sample in samples]


async def too_few(args: Any, samples: list[Sample]) -> list[float]:
    return [1.0]


async def with_keywords(args: Any, sample: Sample, *, bonus: float = 0.0) -> float:
    return 1.0 + bonus


async def busy_then_waits(args: Any, sample: Sample) -> float:
    """Does not wait for the first 0.1 s, then for 0.02 s, which would be in time alone."""
    time.sleep(0.1)  # noqa: ASYNC251 - that is the point
    await asyncio.sleep(0.02)
    return 1.0
