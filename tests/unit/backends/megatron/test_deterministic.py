"""--deterministic-mode: two processes give the same bits, by settings that hold on CUDA too."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import deterministic_run
from support.device import worker_environment
from support.tiny_families import make_tiny_family

pytestmark = pytest.mark.trainer


def run_twice(folder: str, tmp_path: Path) -> list[dict[str, Any]]:
    environment = worker_environment()
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        environment.pop(name, None)
    outs = [tmp_path / f"{number}.pt" for number in range(2)]
    command = [sys.executable, deterministic_run.__file__, folder]
    runs = [subprocess.Popen([*command, str(out)], env=environment) for out in outs]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    return [torch.load(out, weights_only=False) for out in outs]


def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    folder = make_tiny_family(tmp_path, "deepseek_v3", vocab_size=deterministic_run.VOCAB)
    first, second = run_twice(folder, tmp_path)
    assert first["metrics"] == second["metrics"]
    assert [
        n for n, weight in first["weights"].items() if not torch.equal(weight, second["weights"][n])
    ] == []
    for left, right in zip(first["log_probs"], second["log_probs"], strict=True):
        assert torch.equal(left, right)
    # What torch refuses is an error, not a warning: its flash attention listens to that alone.
    assert first["settings"] == {
        "torch": True,
        "warns_only": False,
        "embedding": True,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
    }
