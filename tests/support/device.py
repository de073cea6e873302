"""The device of trainers in tests: the CPU, unless `make test-gpu` sets SLIME_TEST_DEVICE=cuda.

On CUDA trainers of tests compute in fp32 too, so that the suites of the CPU hold them to the same
tolerances; bf16 has tests of its own in tests/gpu.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

DEVICE = os.environ.get("SLIME_TEST_DEVICE", "cpu")
# Words of the command line.
FLAGS = {"cpu": ("--device", "cpu"), "cuda": ("--device", "cuda", "--no-bf16")}[DEVICE]


def num_gpus() -> int:
    """Cards of this machine."""
    import torch

    return torch.cuda.device_count()


def possible_ranks(sizes: Iterable[int]) -> list[int]:
    """Those numbers of ranks that can run here: on CUDA each has a card of its own."""
    return [size for size in sizes if DEVICE == "cpu" or size <= num_gpus()]


def skip_unless_possible(ranks: int) -> None:
    """Skip the test where there are fewer cards than it has ranks."""
    if ranks not in possible_ranks([ranks]):
        pytest.skip(f"needs GPUs: {ranks}, there are {num_gpus()}")


def worker_environment() -> dict[str, str]:
    """For a Python process of a test that imports slime and `support`."""
    root = Path(__file__).parents[2]
    paths = [str(root / "tests"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def on_cpu(value: Any) -> Any:
    """Tensors of a dict, list or tuple, copied to the CPU."""
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(item) for item in value)
    return value.detach().cpu().clone() if hasattr(value, "detach") else value
