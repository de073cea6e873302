import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from aiohttp import web

from slime.data.sample import Sample
from slime.errors import DeadlineExceeded, RewardError
from slime.rollout.rm_hub import remote

Answer = Callable[[httpx.Request], Awaitable[httpx.Response]]
URL = "http://judge/reward"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_BACKOFF_S", 0.001)


@pytest.fixture
async def answer_with() -> AsyncIterator[Callable[[Answer], None]]:
    """Puts a function in the server's place, behind the real client."""
    loop = asyncio.get_running_loop()

    def install(answer: Answer) -> None:
        transport = httpx.MockTransport(answer)
        remote._clients[loop] = httpx.AsyncClient(transport=transport)

    yield install
    await remote._clients.pop(loop).aclose()


def args(url: str = URL, timeout_s: float = 30.0) -> SimpleNamespace:
    return SimpleNamespace(rm_url=url, reward_timeout_s=timeout_s)


async def test_a_server_gets_prompt_response_and_label() -> None:
    seen: list[Any] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(await request.json())
        return web.json_response({"score": 0.5})

    app = web.Application()
    app.router.add_post("/reward", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/reward"
    sample = Sample(prompt="p", response="r", label="l")
    try:
        assert await remote.reward(args(url), sample) == {"score": 0.5}
    finally:
        await remote._clients.pop(asyncio.get_running_loop()).aclose()
        await runner.cleanup()
    assert seen == [{"prompt": "p", "response": "r", "label": "l"}]


async def test_a_busy_server_is_asked_again(answer_with: Callable[[Answer], None]) -> None:
    codes = [503, 429, 200]

    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(codes.pop(0), json=1.0)

    answer_with(answer)
    assert await remote.reward(args(), Sample()) == 1.0


async def test_a_refusal_is_final(answer_with: Callable[[Answer], None]) -> None:
    calls: list[int] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        calls.append(1)
        return httpx.Response(400, text="no such judge")

    answer_with(answer)
    with pytest.raises(RewardError, match="after 1 attempts: HTTP 400: no such judge"):
        await remote.reward(args(), Sample())
    assert calls == [1]


async def test_a_server_that_is_down_is_given_up_after_ten_attempts(
    answer_with: Callable[[Answer], None],
) -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    answer_with(answer)
    with pytest.raises(RewardError, match="after 10 attempts: ConnectError: refused"):
        await remote.reward(args(), Sample())


async def test_a_silent_server_is_given_up_at_the_deadline(
    answer_with: Callable[[Answer], None],
) -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        return httpx.Response(200)

    answer_with(answer)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.1 s"):
        await remote.reward(args(timeout_s=0.1), Sample())


async def test_an_answer_that_is_no_json_is_an_error(
    answer_with: Callable[[Answer], None],
) -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text="fine")

    answer_with(answer)
    with pytest.raises(RewardError, match="no JSON"):
        await remote.reward(args(), Sample())
