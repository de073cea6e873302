"""The Triton kernels against torch, in Triton's interpreter: the same code as on CUDA."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import fused_checks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is made for Linux only"
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What failed in each check; they run in one process, whose Triton interprets."""
    file = tmp_path_factory.mktemp("fused") / "outcome.json"
    root = Path(fused_checks.__file__).parents[2]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(root / "tests"), str(root)]),
    }
    command = [sys.executable, fused_checks.__file__, str(file)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", fused_checks.CHECKS)
def test_kernel_equals_torch(outcome: dict[str, str], name: str) -> None:
    assert outcome[name] == ""
