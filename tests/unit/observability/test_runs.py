import subprocess
import sys
from pathlib import Path

import pytest

from slime.errors import ConfigError
from slime.observability.runs import RunFolder


def test_a_run_without_a_name_gets_a_new_private_folder_by_its_start_time(tmp_path: Path):
    first, second = (RunFolder.open(parent=tmp_path / "runs") for _ in range(2))
    assert first.path.parent == second.path.parent == tmp_path / "runs"
    assert first.path != second.path
    assert first.path.name.startswith("20")
    assert first.path.stat().st_mode & 0o777 == 0o700
    for folder in (first.tensorboard, first.samples, first.rounds, first.logs):
        assert folder.is_dir()


def test_a_folder_in_use_is_refused_and_its_owner_named(tmp_path: Path):
    run = RunFolder.open(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"is in use by process \d+ on "):
        RunFolder.open(tmp_path / "run")
    run.release()
    RunFolder.open(tmp_path / "run").release()


def test_the_lock_of_a_dead_process_holds_nobody_up(tmp_path: Path):
    program = (
        "import os, sys\n"
        "from slime.observability.runs import RunFolder\n"
        "run = RunFolder.open(sys.argv[1])\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], check=True, timeout=60)
    RunFolder.open(tmp_path / "run").release()


def test_the_config_of_an_earlier_run_is_kept(tmp_path: Path):
    run = RunFolder.open(tmp_path / "run")
    for text in ('{"lr": 1}', '{"lr": 2}', '{"lr": 2}', '{"lr": 3}'):
        run.write_config(text)
    run.release()
    kept = {path.name: path.read_text() for path in run.path.glob("config*.json")}
    assert kept == {
        "config.1.json": '{"lr": 1}',
        "config.2.json": '{"lr": 2}',
        "config.json": '{"lr": 3}',
    }


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        RunFolder.open(tmp_path / "file" / "run")
