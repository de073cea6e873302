import asyncio

import pytest

from slime.engines.usage import Usage


def answer(prompt: int, completion: int, cached: int = 0) -> dict[str, object]:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "cached_tokens": cached}
    return {"text": "", "meta_info": counts}


def test_answers_add_up_and_strange_ones_count_nothing():
    usage = Usage()
    usage.add_answer(answer(10, 3, 8))
    usage.add_answer([answer(10, 1), answer(10, 2)])
    usage.add_answer({"meta_info": {"prompt_tokens": "many"}})
    usage.add_answer("no answer")
    assert (usage.requests, usage.tokens_in, usage.tokens_out) == (4, 30, 6)
    assert usage.cached_tokens == 8


async def test_requests_under_way_together_count_their_time_once(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr("slime.engines.usage.monotonic", lambda: now)
    usage, started = Usage(), asyncio.Event()

    async def request() -> None:
        with usage.waiting():
            await started.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(request())
        group.create_task(request())
        await asyncio.sleep(0)
        now = 3.0
        started.set()
    assert usage.engine_time_s == 3.0


def test_a_resumed_sample_goes_on_counting():
    first = Usage(requests=1, tokens_in=5, tokens_out=2, engine_time_s=1.0)
    counts = first.added_to({}, seconds=1.5)
    second = Usage(requests=2, tokens_in=20, tokens_out=4, engine_time_s=2.0, tool_calls=1)
    assert second.added_to(counts, seconds=2.0) == {
        "requests": 3,
        "tokens_in": 25,
        "cached_tokens": 0,
        "tokens_out": 6,
        "engine_time_s": 3.0,
        "other_time_s": 0.5,
        "tool_calls": 1,
        "tool_errors": 0,
    }
