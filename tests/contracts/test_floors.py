"""Floors 0-2 can be imported on a machine without torch; import-linter holds the arrows (`make check`)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "megatron", "sglang", "transformers")

_PROGRAM = """
import importlib, pkgutil, sys
import slime.config, slime.observability, slime.cli
for package in (slime.config, slime.observability):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
for name in ("slime.errors", "slime.registry", "slime.plugins", "slime.cli.parse", "slime.cli.main"):
    importlib.import_module(name)
print(*sorted(set(sys.argv[1:]) & set(sys.modules)))
"""


def test_config_observability_and_the_parser_import_nothing_heavy():
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *HEAVY],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert result.stdout.split() == []
