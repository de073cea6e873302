import threading

import pytest

from slime.observability.profile import Timers, take_timers, time_metrics, timer


def test_seconds_of_one_name_add_up_and_are_taken_once():
    timers = Timers()
    timers.add("train", 1.5)
    timers.add("train", 0.5)
    timers.add("sleep", 0.25)
    assert timers.take() == {"train": 2.0, "sleep": 0.25}
    assert timers.take() == {}


def test_a_block_that_raises_is_still_counted():
    take_timers()
    with pytest.raises(KeyError), timer("load"):
        raise KeyError("x")
    seconds = take_timers()
    assert list(seconds) == ["load"]
    assert seconds["load"] >= 0


def test_threads_lose_no_time():
    timers = Timers()

    def add() -> None:
        for _ in range(1000):
            timers.add("work", 1.0)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timers.take() == {"work": 4000.0}


def test_time_metrics_have_the_documented_names():
    assert time_metrics({"update_weights": 0.8}) == {"perf/update_weights_time": 0.8}
