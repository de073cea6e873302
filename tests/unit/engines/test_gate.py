"""Requests wait at a gate while weights come."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from support.fake_engine import Reply, fake_engine

from slime.engines import client as client_module
from slime.engines.client import EngineClient
from slime.engines.gate import Gate, gate
from slime.errors import EngineUnavailable

PAYLOAD = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 3}}


@pytest.fixture(autouse=True)
def gate_is_left_open() -> Iterator[None]:
    yield
    gate.open()


async def pass_through(barrier: Gate, order: list[int], number: int) -> None:
    async with barrier.request():
        order.append(number)


async def test_requests_wait_while_it_is_closed_and_go_in_their_order() -> None:
    barrier, order = Gate(), list[int]()
    barrier.close()
    tasks = [asyncio.create_task(pass_through(barrier, order, n)) for n in range(5)]
    await asyncio.sleep(0.05)
    assert order == []
    barrier.open()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]


def test_event_loops_of_other_threads_are_woken() -> None:
    barrier, order = Gate(), list[int]()
    barrier.close()
    threads = [
        threading.Thread(target=lambda n=n: asyncio.run(pass_through(barrier, order, n)))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    assert not order
    barrier.open()
    for thread in threads:
        thread.join(10.0)
    assert sorted(order) == [0, 1, 2]


async def test_it_knows_when_no_request_is_under_way() -> None:
    barrier, end = Gate(), asyncio.Event()

    async def request() -> None:
        async with barrier.request():
            await end.wait()

    task = asyncio.create_task(request())
    await asyncio.sleep(0.01)
    assert not barrier.wait_none(0.0)
    waits = asyncio.create_task(asyncio.to_thread(barrier.wait_none, 10.0))
    end.set()
    assert await waits
    await task


async def test_a_request_that_gives_up_at_the_gate_is_none_under_way() -> None:
    barrier, order = Gate(), list[int]()
    barrier.close()
    task = asyncio.create_task(pass_through(barrier, order, 0))
    await asyncio.sleep(0.01)
    task.cancel()
    barrier.open()
    await asyncio.gather(task, return_exceptions=True)
    assert barrier.wait_none(0.0)
    assert order == []


async def test_who_was_cut_short_by_a_closed_gate_goes_on_when_it_opens() -> None:
    barrier = Gate()
    assert not await barrier.opened_within(60.0)
    barrier.close()
    task = asyncio.create_task(barrier.opened_within(60.0))
    await asyncio.sleep(0.01)
    assert not task.done()
    barrier.open()
    assert await task
    assert await barrier.opened_within(60.0)
    assert not await barrier.opened_within(0.0)


async def test_the_client_holds_back_what_makes_engines_generate() -> None:
    async with fake_engine() as engine:
        client = EngineClient(engine.url, timeout_s=5)
        gate.close()
        task = asyncio.create_task(client.generate(PAYLOAD))
        await client.get("/server_info")
        await asyncio.sleep(0.05)
        assert not engine.requests
        gate.open()
        await task
    assert len(engine.requests) == 1


async def test_a_request_that_is_sent_again_passes_the_gate_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "FIRST_BACKOFF_S", 0.001)

    def refuse_and_close(_payload: object, number: int) -> Reply:
        if number == 0:
            gate.close()
        return Reply(status=499 if number == 0 else 200)

    async with fake_engine(refuse_and_close) as engine:
        task = asyncio.create_task(EngineClient(engine.url, timeout_s=5).generate(PAYLOAD))
        await asyncio.sleep(0.1)
        assert (len(engine.requests), gate.wait_none(0.0)) == (1, True)
        gate.open()
        await task
    assert len(engine.requests) == 2


async def test_the_deadline_of_a_request_holds_at_the_gate_too() -> None:
    async with fake_engine() as engine:
        client = EngineClient(engine.url, timeout_s=0.05)
        gate.close()
        with pytest.raises(EngineUnavailable, match="no answer within"):
            await client.generate(PAYLOAD)


async def test_who_is_no_engine_of_the_run_is_asked_all_the_time() -> None:
    async with fake_engine() as judge:
        gate.close()
        await EngineClient("", timeout_s=5).post(
            f"{judge.url.replace('127.0.0.1', 'localhost')}/generate", PAYLOAD
        )
    assert len(judge.requests) == 1
