"""The real router in front of engines: which fields of /generate reach them, and that it serves.

sglang-router 0.3.2 fails these: it rebuilds the body and drops what it does not know.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from support.engine_server import engine_spec, router_spec, running
from support.tiny_models import save_tiny_model

from slime.engines.servers import ServerProcess

TIMEOUT_S = 60.0
Json = dict[str, Any]


class FakeEngine:
    """Answers what a router asks a new worker, and records the bodies of /generate."""

    def __init__(self) -> None:
        self.bodies: list[Json] = []

    def app(self) -> web.Application:
        info = {"model_path": "fake", "served_model_name": "fake", "is_generation": True}
        info |= {"tp_size": 1, "dp_size": 1, "version": "0"}
        models = {"object": "list", "data": [{"id": "fake", "object": "model"}]}

        async def generate(http: web.Request) -> web.Response:
            self.bodies.append(await http.json())
            return web.json_response({"text": "", "output_ids": [1], "meta_info": {"id": "x"}})

        async def answer_info(_: web.Request) -> web.Response:
            return web.json_response(info)

        async def answer_models(_: web.Request) -> web.Response:
            return web.json_response(models)

        async def ok(_: web.Request) -> web.Response:
            return web.Response()

        app = web.Application()
        app.add_routes([web.post("/generate", generate), web.get("/v1/models", answer_models)])
        app.add_routes([web.get(path, answer_info) for path in ("/server_info", "/model_info")])
        app.add_routes([web.get(path, ok) for path in ("/health", "/version", "/metrics")])
        return app


async def register(http: httpx.AsyncClient, url: str) -> None:
    """Add a worker; returns once the router calls it healthy."""
    reply = await http.post("/workers", json={"url": url, "worker_type": "regular"})
    assert reply.status_code == 202, reply.text
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            workers = (await http.get("/workers")).json()["workers"]
            if any(worker["url"] == url and worker["is_healthy"] for worker in workers):
                return


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    with running(router_spec(tmp_path)) as process:
        yield process


@pytest.fixture
async def http(router: ServerProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=router.spec.url, timeout=TIMEOUT_S, trust_env=False
    ) as client:
        yield client


@pytest.fixture
async def recorder(http: httpx.AsyncClient) -> AsyncIterator[FakeEngine]:
    """A recording engine that the router knows."""
    fake = FakeEngine()
    runner = web.AppRunner(fake.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        await register(http, f"http://127.0.0.1:{runner.addresses[0][1]}")
        yield fake
    finally:
        await runner.cleanup()


async def test_fields_we_rely_on_reach_the_engine(
    recorder: FakeEngine, http: httpx.AsyncClient
) -> None:
    sampling = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "max_new_tokens": 3,
        "min_new_tokens": 1,
        "stop": ["a"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "sampling_seed": 11,
        "n": 2,
        "repetition_penalty": 1.1,
        "custom_params": {"return_top_p_token_ids": True},
    }
    body = {
        "input_ids": [1, 2, 3],
        "rid": "r1",
        "return_logprob": True,
        "logprob_start_len": 0,
        "return_routed_experts": True,
        "sampling_seeds": [4, 5],
        "something_of_ours": {"a": [1]},
        "sampling_params": sampling,
    }
    reply = await http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    seen = recorder.bodies[0]
    assert {name: seen.get(name) for name in body if name != "sampling_params"} == {
        name: value for name, value in body.items() if name != "sampling_params"
    }
    assert seen["sampling_params"] == sampling


async def test_parameters_unknown_to_the_router_are_dropped_inside_sampling_params(
    recorder: FakeEngine, http: httpx.AsyncClient
) -> None:
    # What of ours must arrive has to be a top-level field. The second one is SGLang's own; it
    # matters to slow tokenizers only.
    sampling = {"max_new_tokens": 3, "ours": 1, "spaces_between_special_tokens": False}
    await http.post("/generate", json={"input_ids": [1], "sampling_params": sampling})
    assert recorder.bodies[0]["sampling_params"] == {"max_new_tokens": 3}


async def test_the_router_serves_groups_from_embedded_engines(
    http: httpx.AsyncClient, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model")
    with running(engine_spec(model, tmp_path)) as engine:
        await register(http, engine.spec.url)
        body = {
            "input_ids": [5, 6, 7],
            "return_logprob": True,
            "sampling_seeds": [3, 4],
            "sampling_params": {"n": 2, "max_new_tokens": 5, "ignore_eos": True},
        }
        through = await http.post("/generate", json=body)
        direct = await http.post(engine.spec.url + "/generate", json=body)
        for left, right in zip(through.json(), direct.json(), strict=True):
            assert left["output_ids"] == right["output_ids"]
            assert (
                left["meta_info"]["output_token_logprobs"]
                == right["meta_info"]["output_token_logprobs"]
            )
        wrong = {"input_ids": [5], "sampling_params": {"top_p": 7}}
        assert (await http.post("/generate", json=wrong)).status_code == 400
        assert "Traceback" not in engine.log_tail()
