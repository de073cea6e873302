import asyncio
import json
import logging
import threading
import time
from pathlib import Path

import pytest

from slime.observability import waits
from slime.observability.loop_watch import LoopWatch, blamed_function
from slime.observability.waits import current_waits, report_to, subject, waiting


@pytest.fixture(autouse=True)
def _quick_watch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waits, "TICK_S", 0.02)
    monkeypatch.setattr(waits, "_report", None)
    if waits._watch is None:
        with waiting("nobody", "start the watch"):
            pass
    else:
        time.sleep(0.0)


def _until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def test_a_wait_is_noted_while_it_lasts():
    with waiting("engine-0", "answer POST /generate", deadline_s=30.0):
        (row,) = current_waits()
        assert (row.on, row.what, row.count) == ("engine-0", "answer POST /generate", 1)
        assert not row.late
    assert current_waits() == []


def test_a_failed_wait_is_noted_no_more():
    with pytest.raises(ZeroDivisionError), waiting("a", "b"):
        raise ZeroDivisionError
    assert current_waits() == []


async def test_many_waits_alike_are_summed_up_with_the_oldest_subject():
    async def request(number: int) -> None:
        with subject(f"sample {number}"):
            await asyncio.sleep(0)
            with waiting("http://e", "answer POST /generate", deadline_s=60.0):
                await asyncio.sleep(30)

    tasks = [asyncio.create_task(request(number)) for number in range(17, 517)]
    for _ in range(3):  # each task starts, gives way once, and waits
        await asyncio.sleep(0)
    (row,) = current_waits()
    assert row.oldest == "sample 17"
    assert str(row) == (
        "waiting 0 s for http://e to answer POST /generate "
        "(500 such waits, the oldest for sample 17, deadline 60 s)"
    )
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert current_waits() == []


def test_a_late_wait_is_warned_of_seldom_and_others_can_read_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    report_to("train rank 0", tmp_path)
    path = tmp_path / "waits-train-rank-0.json"
    with caplog.at_level(logging.WARNING), waiting("rank 1", "join", warn_after_s=0.05):
        _until(path.exists)
        _until(lambda: "for rank 1 to join" in caplog.text)
        time.sleep(0.4)
        content = json.loads(path.read_text())
    assert content["role"] == "train rank 0"
    assert content["waits"][0]["on"] == "rank 1"
    # Due after 0.05 s and then at twice the age each time; a warning each tick would be over 20.
    assert 1 <= caplog.text.count("for rank 1 to join") <= 5
    _until(lambda: not path.exists())


def test_the_default_warning_comes_after_a_quarter_of_the_deadline_and_a_minute_at_most():
    assert waiting("a", "b", deadline_s=8.0).warn_after_s == 2.0
    assert waiting("a", "b", deadline_s=7200.0).warn_after_s == 60.0
    assert waiting("a", "b").warn_after_s == 60.0


def test_entering_and_leaving_costs_microseconds():
    start = time.perf_counter()
    for _ in range(10_000):
        with waiting("a", "b", deadline_s=1.0):
            pass
    # 2 us measured; the bound leaves room for a busy machine.
    assert (time.perf_counter() - start) / 10_000 < 100e-6


def _sleep_in_a_reward(stop: threading.Event) -> None:
    stop.wait(10.0)


def test_the_function_that_blocks_the_loop_is_named(caplog: pytest.LogCaptureFixture):
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    watch = LoopWatch(loop, thread.ident or 0, blocked_after_s=0.1)
    stop = threading.Event()

    async def reward() -> None:
        _sleep_in_a_reward(stop)

    with caplog.at_level(logging.WARNING):
        task = asyncio.run_coroutine_threadsafe(reward(), loop)
        _until(lambda: "the event loop has been blocked" in caplog.text)
    assert "by _sleep_in_a_reward() at" in caplog.text
    assert f"{Path(__file__).name}:" in caplog.text
    stop.set()
    task.result(10.0)
    _until(lambda: watch.check(time.monotonic()) is None)
    watch.stop()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_thread_that_has_ended_blames_nobody():
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert blamed_function(thread.ident or 0) == "an ended thread"
