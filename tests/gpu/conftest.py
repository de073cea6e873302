"""Tests of the GPU suites skip themselves where there are fewer cards than they need."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from support.device import num_gpus

_NEEDED = {"gpu1": 1, "gpu2": 2, "gpu4": 4}


@pytest.fixture(autouse=True)
def enough_gpus(request: pytest.FixtureRequest) -> None:
    needed = max(n for mark, n in _NEEDED.items() if request.node.get_closest_marker(mark))
    if num_gpus() < needed:
        pytest.skip(f"needs GPUs: {needed}, there are {num_gpus()}")


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """Trainers of a file share the default group; it ends with the file."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
