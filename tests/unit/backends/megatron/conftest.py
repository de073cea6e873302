"""What every file here needs: no process group of one file lives on in the next."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """Trainers of a file share the default group; it ends with the file."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
