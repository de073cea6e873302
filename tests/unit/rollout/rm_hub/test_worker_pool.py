import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.errors import DeadlineExceeded, RewardError
from slime.rollout.rm_hub.worker_pool import WorkerPool

COMMAND = [sys.executable, str(Path(__file__).parents[3] / "support" / "fake_reward_worker.py")]


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(COMMAND, 1, start_timeout_s=60.0)
    yield pool
    pool.close()


async def test_answers_belong_to_their_requests(pool: WorkerPool) -> None:
    asked = [pool.ask({"value": i}, deadline_s=10) for i in range(20)]
    assert [answer["echo"] for answer in await asyncio.gather(*asked)] == list(range(20))


async def test_a_hanging_worker_is_killed_at_the_deadline_and_replaced(pool: WorkerPool) -> None:
    first = await pool.ask({"value": 1}, deadline_s=10)
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.2 s"):
        await pool.ask({"value": 2, "sleep_s": 60}, deadline_s=0.2)
    assert time.monotonic() - start < 2
    second = await pool.ask({"value": 3}, deadline_s=10)
    assert second["echo"] == 3
    assert second["pid"] != first["pid"]


async def test_waiting_in_the_queue_costs_no_deadline(pool: WorkerPool) -> None:
    await pool.ask({"value": 0}, deadline_s=10)
    asked = [pool.ask({"value": i, "sleep_s": 0.15}, deadline_s=0.6) for i in range(6)]
    assert len(await asyncio.gather(*asked)) == 6


async def test_a_worker_that_dies_is_an_error_and_replaced(pool: WorkerPool) -> None:
    with pytest.raises(RewardError, match="died with code 3"):
        await pool.ask({"die": True}, deadline_s=10)
    assert (await pool.ask({"value": 1}, deadline_s=10))["echo"] == 1


async def test_a_request_that_queues_can_be_withdrawn(pool: WorkerPool) -> None:
    running = asyncio.create_task(pool.ask({"value": 1, "sleep_s": 0.3}, deadline_s=10))
    queued = asyncio.create_task(pool.ask({"value": 2, "sleep_s": 60}, deadline_s=60))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    assert (await running)["echo"] == 1
    assert (await pool.ask({"value": 3}, deadline_s=1))["echo"] == 3


async def test_a_command_that_does_not_start_is_an_error() -> None:
    pool = WorkerPool([sys.executable, "-c", "raise SystemExit(4)"], 1)
    with pytest.raises(RewardError, match="died with code 4"):
        await pool.ask({"value": 1}, deadline_s=1)
    pool.close()
