import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.observability.profile import take_timers, timer
from slime.observability.timeline import (
    Timeline,
    add_span,
    close_timeline,
    flush_timeline,
    open_timeline,
    span,
)


@pytest.fixture(autouse=True)
def no_timeline_is_left_open() -> Iterator[None]:
    yield
    close_timeline()
    take_timers()


def rows(run: Path, name: str = "driver") -> list[dict]:
    text = (run / "timeline" / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_timer_writes_a_span_once_the_timeline_is_open(tmp_path: Path):
    take_timers()  # of other tests in this process
    with timer("before"):
        pass
    open_timeline("train rank 3", tmp_path)
    with timer("train", rollout_id=7):
        pass
    flush_timeline()
    (row,) = rows(tmp_path, "train-rank-3")
    assert (row["role"], row["name"], row["rollout_id"]) == ("train rank 3", "train", 7)
    assert 0 <= row["end"] - row["start"] < 5
    assert set(take_timers()) == {"before", "train"}


def test_a_span_is_no_metric(tmp_path: Path):
    take_timers()
    open_timeline("driver", tmp_path)
    with span("save"):
        pass
    assert take_timers() == {}  # and it flushes
    assert [row["name"] for row in rows(tmp_path)] == ["save"]


def test_inner_spans_take_over_the_round_around_them(tmp_path: Path):
    open_timeline("driver", tmp_path)
    with span("outer", rollout_id=4):
        with span("inner"):
            add_span("timed", 1.0, 2.5)
        with span("other", rollout_id=5):
            pass
    with span("after"):
        pass
    close_timeline()
    found = {row["name"]: row.get("rollout_id") for row in rows(tmp_path)}
    assert found == {"timed": 4, "inner": 4, "other": 5, "outer": 4, "after": None}


def test_rounds_of_two_threads_do_not_mix(tmp_path: Path):
    open_timeline("driver", tmp_path)
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with span("other", rollout_id=2):
            inside.set()
            done.wait(5)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(5)
    with span("mine"):
        pass
    done.set()
    thread.join()
    close_timeline()
    assert {row["name"]: row.get("rollout_id") for row in rows(tmp_path)} == {
        "mine": None,
        "other": 2,
    }


def test_a_span_that_raises_is_kept(tmp_path: Path):
    open_timeline("driver", tmp_path)
    with pytest.raises(KeyError), span("load"):
        raise KeyError("x")
    close_timeline()
    assert [row["name"] for row in rows(tmp_path)] == ["load"]


def test_half_a_line_of_a_killed_run_stays_alone(tmp_path: Path):
    path = tmp_path / "driver.jsonl"
    path.write_text('{"name": "old"}\n{"name": "cu')
    timeline = Timeline(path, "driver")
    timeline.add("new", 1.0, 2.0)
    timeline.close()
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"name": "old"}', '{"name": "cu']
    assert json.loads(lines[2])["name"] == "new"


def test_spans_are_written_about_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr("slime.observability.timeline.time.monotonic", lambda: clock[0])
    path = tmp_path / "driver.jsonl"
    timeline = Timeline(path, "driver")
    timeline.add("a", 1.0, 2.0)
    assert path.read_text() == ""
    clock[0] += 1.5
    timeline.add("b", 2.0, 3.0)
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["a", "b"]
    timeline.close()


def test_a_full_disk_ends_the_timeline_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    timeline = Timeline(Path("/dev/full"), "driver") if Path("/dev/full").exists() else None
    if timeline is None:
        pytest.skip("this system has no /dev/full")
    timeline.add("a", 1.0, 2.0)
    timeline.flush()
    timeline.add("b", 1.0, 2.0)
    timeline.close()
    assert [record.getMessage()[:22] for record in caplog.records] == ["the timeline ends here"]
