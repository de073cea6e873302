import asyncio
import threading

import pytest
from aiohttp import web

from slime.engines.control import EngineControl
from slime.engines.ports import hold_port
from slime.errors import EngineProtocolError, EngineUnavailable


@pytest.fixture
def fake_engine():
    """A real HTTP server that answers what the path says."""
    port = hold_port()
    loop = asyncio.new_event_loop()

    async def ok(request: web.Request) -> web.Response:
        return web.json_response({"echo": await request.json()})

    async def refuse(request: web.Request) -> web.Response:
        return web.json_response({"success": False, "message": "unknown parameter x"})

    async def broken(request: web.Request) -> web.Response:
        return web.Response(text='{"half":')

    async def missing(request: web.Request) -> web.Response:
        return web.Response(status=404, text="nothing here")

    app = web.Application()
    app.add_routes([web.post(f"/{f.__name__}", f) for f in (ok, refuse, broken, missing)])
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", port).start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


@pytest.fixture
def control(fake_engine):
    control = EngineControl([fake_engine, fake_engine], timeout_s=5.0)
    yield control
    control.close()


def test_each_engine_gets_its_own_payload(control):
    answers = control.post_all("/ok", lambda engine: {"rank": engine + 1})
    assert [answer["echo"]["rank"] for answer in answers] == [1, 2]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/refuse", "unknown parameter x"),
        ("/broken", "no JSON"),
        ("/missing", "status 404: nothing here"),
    ],
)
def test_a_wrong_answer_names_engine_and_reason(control, fake_engine, path, message):
    with pytest.raises(EngineProtocolError, match=message) as caught:
        control.post_all(path)
    assert fake_engine + path in str(caught.value)


def test_an_engine_that_is_gone_is_named():
    url = f"http://127.0.0.1:{hold_port()}"
    control = EngineControl([url], timeout_s=5.0)
    with pytest.raises(EngineUnavailable, match=url):
        control.pause("retract")
    control.close()


def test_an_aborting_pause_ends_requests_first_and_waits_for_them():
    port, loop, calls = hold_port(), asyncio.new_event_loop(), list[str]()
    counts = iter([2, 1, 0])

    async def note(request: web.Request) -> web.Response:
        calls.append(request.path)
        return web.json_response({})

    async def loads(request: web.Request) -> web.Response:
        calls.append(request.path)
        load = {"num_running_reqs": next(counts), "num_waiting_reqs": 0}
        return web.json_response({"loads": [load]})

    app = web.Application()
    app.add_routes([web.post(p, note) for p in ("/abort_request", "/pause_generation")])
    app.add_routes([web.get("/v1/loads", loads)])
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", port).start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    control = EngineControl([f"http://127.0.0.1:{port}"], timeout_s=5.0)
    try:
        control.pause("abort")
        assert calls == ["/abort_request", *["/v1/loads"] * 3, "/pause_generation"]
        calls.clear()
        control.pause("retract")
        assert calls == ["/pause_generation"]
    finally:
        control.close()
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()
