"""The doctor on real processes and real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import patient as patient_script

from slime.observability import doctor
from slime.observability.doctor import (
    dump_all,
    examine,
    is_same_process,
    late_report,
    register_process,
)

ROOT = Path(__file__).resolve().parents[3]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Generator[Start]:
    running: list[subprocess.Popen[str]] = []

    def begin(role: str, *flags: str, env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, patient_script.__file__, str(tmp_path), role, *flags],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(autouse=True)
def _unregistered() -> Generator[None]:
    doctor.unregister_process()
    yield
    doctor.unregister_process()


def _note_of(tmp_path: Path, role: str) -> dict[str, Any]:
    return json.loads((tmp_path / "processes" / f"{role}.json").read_text())


def test_each_process_tells_its_stacks_and_whom_it_waits_for(start: Start, tmp_path: Path):
    process = start("rollout manager")
    waits_file = tmp_path / "doctor" / "waits-rollout-manager.json"
    deadline = time.monotonic() + 20.0
    while not waits_file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    folder = dump_all(tmp_path, "a test")
    assert folder.parent == tmp_path / "doctor"
    assert "in wait_for_ever" in (folder / "stacks-rollout-manager.txt").read_text()
    assert (folder / "waits-rollout-manager.json").is_file()
    summary = (folder / "summary.txt").read_text()
    assert "a test" in summary
    assert f"rollout manager (pid {process.pid}): waiting 0 s for train rank 1 to join" in summary
    assert "in wait_for_ever() at" in summary
    assert process.poll() is None


def test_a_second_examination_holds_only_its_own_stacks(start: Start, tmp_path: Path):
    start("driver")
    first, second = dump_all(tmp_path, "one"), dump_all(tmp_path, "two")
    assert first != second
    for folder in (first, second):
        assert (folder / "stacks-driver.txt").read_text().count("in wait_for_ever") == 1


def test_a_process_that_stands_still_is_said_to(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctor, "ANSWER_S", 0.3)
    process = start("engine-0")
    process.send_signal(signal.SIGSTOP)
    (line,) = examine(tmp_path, "a test").lines
    assert "gave no stacks within 0 s: the system says it is stopped" in line


def test_waits_that_end_together_share_one_examination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert late_report("late.") == "late. The logs are in the run folder under logs/."
    monkeypatch.setattr(doctor, "_last", None)
    register_process("driver", tmp_path)
    first, second = late_report("late."), late_report("later.")
    assert first.startswith("late. All stacks are in ")
    assert len(list((tmp_path / "doctor").glob("*/summary.txt"))) == 1
    assert first.removeprefix("late.") == second.removeprefix("later.")


def test_a_run_started_again_forgets_the_processes_of_before(start: Start, tmp_path: Path):
    start("engine-0")
    folder = dump_all(tmp_path, "a test")
    doctor.begin_run(tmp_path)
    assert list((tmp_path / "processes").iterdir()) == []
    assert (folder / "summary.txt").is_file()


def test_a_process_that_ended_is_named_and_its_number_is_not_signalled(
    start: Start, tmp_path: Path
):
    process = start("train rank 1")
    process.kill()
    process.wait()
    assert examine(tmp_path, "a test").lines == (
        f"train rank 1 (pid {process.pid}) is not running any more",
    )


def test_a_number_given_to_another_process_is_not_signalled(start: Start, tmp_path: Path):
    # The note of a process long gone, whose number an innocent process has now: it would die.
    innocent = start("-", "--silent")
    doctor._write_note(
        tmp_path_with_folders(tmp_path),
        replace(doctor._note("driver", innocent.pid, answers=True, address=""), started=12345.0),
    )
    assert "is not running any more" in examine(tmp_path, "a test").lines[0]
    assert innocent.poll() is None


def test_a_process_without_a_handler_is_not_signalled(start: Start, tmp_path: Path):
    innocent = start("-", "--silent")
    note = doctor._note("driver", innocent.pid, answers=True, address="")
    doctor._write_note(tmp_path_with_folders(tmp_path), note)
    assert "driver" in examine(tmp_path, "a test").lines[0]
    assert innocent.poll() is None


def test_a_process_that_is_not_ours_is_looked_at_from_outside_or_said_not_to_be(
    start: Start, tmp_path: Path
):
    register_process("driver", tmp_path)
    child = start("-", "--silent")
    doctor.register_child("router", child.pid, address="http://127.0.0.1:4")
    line = next(line for line in examine(tmp_path, "a test").lines if "router" in line)
    # py-spy needs the right to trace; either way the line says what is known.
    assert "wait_for_ever" in line or "py-spy" in line


def test_a_child_of_ours_registers_by_its_environment(start: Start, tmp_path: Path):
    register_process("driver", tmp_path)
    env = doctor.child_environment("engine-0")
    code = "from slime.observability.doctor import register_from_environment as r; r(address='x')"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
    )
    note = _note_of(tmp_path, "engine-0")
    assert note["answers"] is True
    assert note["address"] == "x"


def test_without_a_run_nothing_is_noted_for_children():
    assert doctor.child_environment("engine-0") == {}
    doctor.register_child("engine-0", os.getpid())


def test_hosts_that_were_not_asked_are_named(tmp_path: Path):
    note = doctor._note("train rank 8", 4, answers=True, address="")
    doctor._write_note(tmp_path_with_folders(tmp_path), replace(note, host="node-7"))
    assert "not asked, on other hosts" in examine(tmp_path, "a test").lines[-1]
    assert "node-7" in examine(tmp_path, "a test").lines[-1]


def test_a_process_is_known_by_its_number_and_its_start():
    started = doctor.psutil.Process().create_time()
    assert is_same_process(os.getpid(), started)
    assert not is_same_process(os.getpid(), started - 60.0)


def tmp_path_with_folders(tmp_path: Path) -> Path:
    (tmp_path / "processes").mkdir()
    return tmp_path
