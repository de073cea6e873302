"""Starting in a folder again: rows put aside, a restart at 0 refused, old processes waited for."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.config_argv import base_argv

from slime.cli.parse import load_config
from slime.errors import ConfigError
from slime.observability.doctor import ProcessNote
from slime.observability.runs import RunFolder
from slime.orchestration.attempts import (
    SUPERSEDED,
    await_predecessors,
    begin_attempt,
    put_metrics_aside,
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    run = RunFolder.open(tmp_path / "run")
    yield run
    run.release()


def rows_of_three_rounds() -> list[dict[str, Any]]:
    """As Records writes them: an evaluation before all, two steps a round, one after round 1."""
    rows: list[dict[str, Any]] = [{"eval/step": 0}]
    for rollout_id in range(3):
        rows += [{"train/step": 2 * rollout_id}, {"train/step": 2 * rollout_id + 1}]
        rows.append({"rollout/step": rollout_id})
        if rollout_id == 1:
            rows.append({"eval/step": 2})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("first", "kept"), [(0, 0), (1, 4), (2, 8), (3, 11), (9, 11)])
def test_rows_of_rounds_to_come_are_put_aside_and_none_is_lost(
    tmp_path: Path, first: int, kept: int
) -> None:
    path, rows = tmp_path / "metrics.jsonl", rows_of_three_rounds()
    write_rows(path, rows)
    assert put_metrics_aside(path, first) == len(rows) - kept
    found = [json.loads(line) for line in path.read_text().splitlines()]
    aside = tmp_path / SUPERSEDED
    moved = [json.loads(line) for line in aside.read_text().splitlines()] if aside.exists() else []
    assert (found, moved) == (rows[:kept], rows[kept:])


def test_half_a_row_goes_and_steps_of_an_unfinished_round_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [{"rollout/step": 0}, {"train/step": 2}])
    with path.open("a") as file:
        file.write('{"train/st')
    assert put_metrics_aside(path, 1) == 2
    assert path.read_text() == '{"rollout/step": 0}\n'


def test_a_restart_at_round_0_is_refused_where_a_checkpoint_is(
    folder: RunFolder, tmp_path: Path
) -> None:
    config = load_config(base_argv(tmp_path))
    ledger, _ = begin_attempt(folder, config, 0)
    ledger.checkpoint(4, str(tmp_path / "ckpt"))
    with pytest.raises(ConfigError, match=r"checkpoint after round 4 .* give --load .*ckpt"):
        begin_attempt(folder, config, 0)
    begin_attempt(folder, config, 5)


def test_a_start_that_left_no_checkpoint_may_begin_again(folder: RunFolder, tmp_path: Path) -> None:
    config = load_config(base_argv(tmp_path))
    begin_attempt(folder, config, 0)
    assert begin_attempt(folder, config, 0)[0].attempt(0) == 3


def test_a_start_learns_who_wrote_the_round_that_was_begun_before_its_checkpoint(
    folder: RunFolder, tmp_path: Path
) -> None:
    config = load_config(base_argv(tmp_path))
    ledger, written_by = begin_attempt(folder, config, 0)
    assert written_by is None
    ledger.checkpoint(1, str(tmp_path / "ckpt"), "weights of round 1")
    ledger.checkpoint(3, str(tmp_path / "ckpt"), "weights of round 3")
    assert begin_attempt(folder, config, 4)[1] == "weights of round 3"
    # From an older checkpoint: what lies behind it is superseded, and so is what is known of it.
    assert begin_attempt(folder, config, 2)[1] is None


def note_process(folder: Path, process: subprocess.Popen[bytes]) -> None:
    note = ProcessNote(
        role="train rank 0",
        pid=process.pid,
        started=psutil.Process(process.pid).create_time(),
        host=socket.gethostname(),
        answers=False,
    )
    (folder / "processes").mkdir(exist_ok=True)
    (folder / "processes" / "train-rank-0.json").write_text(json.dumps(asdict(note)))


def test_processes_of_an_earlier_start_are_waited_for_and_named(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        note_process(tmp_path, process)
        with pytest.raises(ConfigError, match=rf"train rank 0 \(pid {process.pid}\)"):
            await_predecessors(tmp_path, timeout_s=0.3)
        assert process.stdin is not None
        threading.Timer(0.3, process.stdin.close).start()
        threading.Thread(target=process.wait, daemon=True).start()
        await_predecessors(tmp_path, timeout_s=20.0)
    finally:
        process.kill()
        process.wait()
