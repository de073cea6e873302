"""The locks: no index addresses, within the ranges of pyproject.toml, and agreeing with each other."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("cpu", "gpu", "sglang-cpu")


def lock_lines(flavour: str) -> list[str]:
    text = (ROOT / f"requirements/{flavour}.lock").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pinned(flavour: str) -> dict[str, str]:
    """Canonical name -> version."""
    versions: dict[str, str] = {}
    for line in lock_lines(flavour):
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        versions[canonicalize_name(requirement.name)] = specifier.version
    return versions


def wanted(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    lines = project["dependencies"] + [line for extra in extras for line in optional[extra]]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("flavour", LOCKS)
def test_a_lock_names_packages_and_no_place_to_get_them(flavour: str):
    text = (ROOT / f"requirements/{flavour}.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-", text, re.MULTILINE), "an option such as --index-url"
    assert not re.search(r"(^|\s)/\w", text), "a path of some machine"


@pytest.mark.parametrize(("flavour", "extras"), [("cpu", ("dev",)), ("gpu", ("dev", "gpu"))])
def test_a_lock_satisfies_the_ranges(flavour: str, extras: tuple[str, ...]):
    versions = pinned(flavour)
    for requirement in wanted(*extras):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, requirement
        assert requirement.specifier.contains(version, prereleases=True), (requirement, version)


def test_shared_versions_agree_and_no_engine_is_installed_on_a_laptop():
    cpu, gpu = pinned("cpu"), pinned("gpu")
    assert {n: v for n, v in cpu.items() if gpu.get(n, v) != v} == {}
    assert "sglang" in gpu
    assert "sglang" not in cpu


def test_sglang_on_a_cpu_is_the_one_of_the_gpu_lock_and_hides_nothing_of_the_cpu_lock():
    """Its folder lies in front of .venv."""
    gpu, sglang = pinned("gpu"), pinned("sglang-cpu")
    assert "sglang" in sglang
    assert {n: v for n, v in sglang.items() if gpu.get(n) != v} == {}
    assert sglang.keys() & pinned("cpu").keys() == set()
