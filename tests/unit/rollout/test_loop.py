import asyncio
import threading

import pytest

from slime.errors import DeadlineExceeded
from slime.rollout import loop


async def name_of_thread() -> str:
    return threading.current_thread().name


def test_all_work_runs_on_one_thread():
    assert loop.run(name_of_thread()) == loop.run(name_of_thread()) == "slime-event-loop"


def test_error_reaches_the_caller():
    async def fail() -> None:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        loop.run(fail())


def test_timeout_of_the_coroutine_is_not_taken_for_ours():
    async def fail() -> None:
        raise TimeoutError("inside")

    with pytest.raises(TimeoutError, match="inside"):
        loop.run(fail(), timeout_s=5)


def test_deadline_cancels_the_coroutine():
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(DeadlineExceeded, match=r"wait did not finish within 0\.01 s"):
        loop.run(wait(), timeout_s=0.01)
    assert cancelled.wait(5)


def test_run_on_the_loop_itself_is_refused():
    async def nested() -> None:
        loop.run(name_of_thread())

    with pytest.raises(RuntimeError, match=r"run\(name_of_thread\) was called on the event loop"):
        loop.run(nested())


def test_shutdown_cancels_what_runs_and_a_new_loop_starts():
    ended = threading.Event()

    async def background() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def start() -> "asyncio.Task[None]":
        task = asyncio.create_task(background())
        await asyncio.sleep(0)
        return task

    loop.run(start())
    loop.shutdown()
    assert ended.is_set()
    assert loop.run(name_of_thread()) == "slime-event-loop"
    loop.shutdown()


def test_gather_cancels_the_others_when_one_fails():
    ended: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("waiter")

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        loop.run(loop.gather([wait(), fail()]))
    assert ended == ["waiter"]


def test_gather_of_coroutines_that_wait_for_nothing_takes_no_turn_of_the_loop():
    turns: list[str] = []

    async def at_once(number: int) -> int:
        return number

    async def both() -> list[int]:
        asyncio.get_running_loop().call_soon(turns.append, "turn")
        results = await loop.gather([at_once(1), at_once(2)])
        assert turns == []
        return results

    assert loop.run(both()) == [1, 2]


def test_gather_runs_what_waits_at_the_same_time_and_keeps_the_order():
    order: list[str] = []

    async def main() -> list[str]:
        second_is_there = asyncio.Event()

        async def first() -> str:
            await asyncio.wait_for(second_is_there.wait(), 5)
            order.append("first")
            return "first"

        async def second() -> str:
            second_is_there.set()
            order.append("second")
            return "second"

        return await loop.gather([first(), second()])

    assert loop.run(main()) == ["first", "second"]
    assert order == ["second", "first"]


def test_gather_starts_all_and_raises_what_the_first_raised_at_once():
    started: list[int] = []

    async def fail(number: int) -> None:
        started.append(number)
        raise ValueError(str(number))

    with pytest.raises(ValueError, match="1"):
        loop.run(loop.gather([fail(1), fail(2)]))
    assert started == [1, 2]
