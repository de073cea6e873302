"""FakeEngine: a real HTTP server on a free port that answers /generate as a test tells it to."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from slime.engines.client import close_clients

Payload = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """How one /generate request is answered.

    Attributes:
        ids: tokens written; None = four tokens that depend on the seed alone.
        finish: type of the finish reason.
        hold: wait until the engine is told to abort, then answer "abort" with `ids` as the part
            that was ready; or until `release` is called, then answer as usual.
        status, body: another status, or a body that replaces the JSON answer.
        disconnect: close the connection without an answer.
    """

    ids: tuple[int, ...] | None = None
    finish: str = "stop"
    hold: bool = False
    status: int = 200
    body: bytes | None = None
    disconnect: bool = False


def seeded_ids(seed: int | None, num_tokens: int = 4) -> tuple[int, ...]:
    """Tokens that depend on the seed, printable characters of the tiny tokenizer."""
    return tuple(20 + ((seed or 0) + 7 * i) % 80 for i in range(num_tokens))


class FakeEngine:
    """Speaks the part of the engine protocol that a rollout uses.

    Attributes:
        requests: bodies of all /generate requests, in order of arrival.
        headers: their headers.
        num_aborts: /abort_request calls.
        held: requests that wait at this moment.
    """

    def __init__(self, on_generate: Callable[[Payload, int], Reply] | None = None) -> None:
        self.on_generate = on_generate or (lambda payload, number: Reply())
        self.requests: list[Payload] = []
        self.headers: list[dict[str, str]] = []
        self.num_aborts = 0
        self.held = 0
        self.weight_version = "0"
        self._wakers: list[asyncio.Event] = []
        self._released = asyncio.Event()
        self._count_changed = asyncio.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.add_routes(
            [
                web.post("/generate", self._generate),
                web.post("/abort_request", self._abort),
                web.get("/server_info", self._server_info),
                web.get("/model_info", self._model_info),
                web.get("/health", self._health),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port: int = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def holds(self, number: int) -> None:
        """Return once so many requests wait."""
        async with asyncio.timeout(10):
            async with self._count_changed:
                await self._count_changed.wait_for(lambda: self.held == number)

    def release(self) -> None:
        """Let held requests finish as if nothing had happened."""
        self._released.set()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        payload: Payload = await request.json()
        number = len(self.requests)
        self.requests.append(payload)
        self.headers.append(dict(request.headers))
        reply = self.on_generate(payload, number)
        if reply.disconnect:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        aborted = await self._hold() if reply.hold else False
        if reply.status != 200 or reply.body is not None:
            return web.Response(status=reply.status, body=reply.body or b"scripted error")
        return web.json_response(self._answers(payload, reply, aborted))

    async def _hold(self) -> bool:
        """True when an abort ended the wait."""
        waker = asyncio.Event()
        self._wakers.append(waker)
        await self._count_held(1)
        waits = [asyncio.ensure_future(event.wait()) for event in (waker, self._released)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return waker.is_set()
        finally:
            for wait in waits:
                wait.cancel()
            await self._count_held(-1)

    async def _count_held(self, change: int) -> None:
        self.held += change
        async with self._count_changed:
            self._count_changed.notify_all()

    def _answers(self, payload: Payload, reply: Reply, aborted: bool) -> Any:
        params = payload["sampling_params"]
        if "n" not in params:
            return self._answer(payload, reply, params.get("sampling_seed"), aborted)
        seeds = payload.get("sampling_seeds", list(range(params["n"])))  # without, its own choice
        assert len(seeds) == params["n"]
        return [self._answer(payload, reply, seed, aborted) for seed in seeds]

    def _answer(self, payload: Payload, reply: Reply, seed: int | None, aborted: bool) -> Any:
        ids = reply.ids if reply.ids is not None else seeded_ids(seed)
        limit = payload["sampling_params"].get("max_new_tokens", len(ids))
        finish = "abort" if aborted else "length" if len(ids) > limit else reply.finish
        ids = ids[:limit]
        return {
            "text": "".join(chr(65 + i % 26) for i in ids),
            "output_ids": list(ids),
            "meta_info": {
                "id": "fake",
                "finish_reason": {"type": finish},
                "prompt_tokens": len(payload["input_ids"]),
                "completion_tokens": len(ids),
                "cached_tokens": 1,
                "weight_version": self.weight_version,
                "output_token_logprobs": [[-0.5, i, None] for i in ids],
                "e2e_latency": 0.25,
                "queue_time": 0.0,
            },
        }

    async def _abort(self, request: web.Request) -> web.Response:
        assert await request.json() == {"abort_all": True}
        self.num_aborts += 1
        for waker in self._wakers:
            waker.set()
        return web.Response()

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"slime_engine": "fake"})

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.weight_version})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()


@asynccontextmanager
async def fake_engine(
    on_generate: Callable[[Payload, int], Reply] | None = None,
) -> AsyncIterator[FakeEngine]:
    """A FakeEngine that answers for the length of the block; closes the loop's clients after it."""
    engine = FakeEngine(on_generate)
    await engine.start()
    try:
        yield engine
    finally:
        await close_clients()
        await engine.stop()
