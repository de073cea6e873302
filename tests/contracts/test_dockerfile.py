"""The Dockerfile agrees with the lock and installs by the target that everybody uses."""

import re
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def pinned(name: str) -> str:
    lines = (ROOT / "requirements" / "gpu.lock").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.startswith(f"{name}==")]
    assert len(found) == 1, name
    return str(found[0].specifier).removeprefix("==")


def test_the_image_has_the_cuda_of_the_locked_torch() -> None:
    (version,) = re.findall(r"^FROM nvidia/cuda:([\d.]+)-devel-ubuntu24\.04$", TEXT, re.MULTILINE)
    assert version == pinned("cuda-toolkit")


def test_packages_come_from_the_lock_alone() -> None:
    assert not re.search(r"\b(pip|uv|curl|wget)\b", TEXT)
    (target,) = re.findall(r"^RUN make (\S+)", TEXT, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f".PHONY: {target}\n" in makefile
    rule = makefile[makefile.index(f"\n{target}:") :].splitlines()[1:3]
    assert "scripts/setup.sh gpu" in "\n".join(rule)
    assert 'LOCK="requirements/$FLAVOUR.lock"' in (ROOT / "scripts/setup.sh").read_text()


def test_the_interpreter_is_the_locks_and_is_installed() -> None:
    (python,) = re.findall(r"PYTHON=/usr/bin/python(\S+)", TEXT)
    for line in (f"python{python}-dev", f"python{python}-venv"):
        assert line in TEXT
    assert f"--python-version {python}" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_commands_of_the_environment_are_found() -> None:
    (workdir,) = re.findall(r"^WORKDIR (\S+)$", TEXT, re.MULTILINE)
    assert f"ENV PATH={workdir}/.venv/bin:$PATH" in TEXT
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".venv", ".git", "runs"} <= set(ignored)
