"""The project's own files: nothing of one machine in them, and what a fresh clone needs is there."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {"runs", "build", "dist", "__pycache__"}
SUFFIXES = {".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".lock", ".json", ".txt", ""}

# Put together here, so that this file does not find itself.
FOREIGN = ["/ro" + "ot/", "/wo" + "rk/", "../sha" + "red", "pypi." + "org", "pythonhosted." + "org"]


def project_files() -> list[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [n for n in folders if n == ".ci" or not (n in SKIPPED or n.startswith("."))]
        found += [Path(folder) / name for name in files]
    return [path for path in found if path.suffix in SUFFIXES and path.stat().st_size < 4_000_000]


def test_no_file_names_a_path_of_one_machine_or_a_registry_host():
    hits = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in project_files()
        for word in FOREIGN
        if word in path.read_text(encoding="utf-8", errors="ignore")
    ]
    assert hits == []


def test_what_a_fresh_clone_needs_is_there_and_runs():
    for name in (".ci/run", "scripts/setup.sh"):
        assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert (ROOT / "slime/py.typed").exists()
