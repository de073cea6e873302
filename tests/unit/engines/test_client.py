import asyncio
import socket

import orjson
import pytest
from support.fake_engine import Reply, fake_engine

from slime.engines import client as client_module
from slime.engines.client import EngineClient, close_clients, get, post
from slime.errors import EngineError, EngineProtocolError, EngineUnavailable

PAYLOAD = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 3}}


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(client_module, "MAX_BACKOFF_S", 0.002)


def first(reply: Reply, then: Reply = Reply()):  # noqa: B008 - frozen
    return lambda payload, number: reply if number == 0 else then


async def test_generate_returns_the_answer():
    async with fake_engine() as engine:
        answer = await EngineClient(engine.url, timeout_s=5).generate(
            PAYLOAD, headers={"X-SMG-Routing-Key": "k"}
        )
    assert isinstance(answer, dict)
    assert answer["meta_info"]["completion_tokens"] == 3
    assert engine.requests == [PAYLOAD]
    assert engine.headers[0]["X-SMG-Routing-Key"] == "k"
    assert engine.headers[0]["Content-Type"] == "application/json"


async def test_api_key_is_sent_as_bearer_token():
    async with fake_engine() as engine:
        await EngineClient(engine.url, timeout_s=5, api_key="secret").generate(PAYLOAD)
    assert engine.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("status", [429, 499, 502, 503, 504])
async def test_busy_server_is_asked_again(status: int):
    async with fake_engine(first(Reply(status=status))) as engine:
        await EngineClient(engine.url, timeout_s=5).generate(PAYLOAD)
    assert len(engine.requests) == 2


async def test_lost_connection_is_asked_again_by_generate():
    async with fake_engine(first(Reply(disconnect=True))) as engine:
        await EngineClient(engine.url, timeout_s=5).generate(PAYLOAD)
    assert len(engine.requests) == 2


async def test_lost_connection_is_not_asked_again_by_a_control_call():
    async with fake_engine(first(Reply(disconnect=True))) as engine:
        with pytest.raises(EngineUnavailable, match="not sent again"):
            await EngineClient(engine.url, timeout_s=5).post("/generate", PAYLOAD)
    assert len(engine.requests) == 1


async def test_refusal_is_raised_at_once_with_the_body():
    async with fake_engine(first(Reply(status=400, body=b"prompt too long" * 100))) as engine:
        with pytest.raises(EngineProtocolError, match=r"status 400: prompt too long.* \.\.\.$"):
            await EngineClient(engine.url, timeout_s=5).generate(PAYLOAD)
    assert len(engine.requests) == 1


async def test_server_failure_is_raised_at_once():
    async with fake_engine(first(Reply(status=500))) as engine:
        with pytest.raises(EngineError, match="status 500: scripted error"):
            await EngineClient(engine.url, timeout_s=5).generate(PAYLOAD)
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    "body", [b"<html>", b'{"text": "x"}', b'{"meta_info": 1', b"[3]", b'[{"meta_info": {}}, {}]']
)
async def test_answer_without_meta_info_names_the_address(body: bytes):
    async with fake_engine(first(Reply(body=body))) as engine:
        with pytest.raises(EngineProtocolError, match=f"POST {engine.url}/generate answered"):
            await EngineClient(engine.url, timeout_s=5).generate(PAYLOAD)


async def test_deadline_covers_a_server_that_never_answers():
    async with fake_engine(first(Reply(hold=True))) as engine:
        with pytest.raises(EngineUnavailable, match=r"no answer within 0\.05 s \(1 attempts"):
            await EngineClient(engine.url, timeout_s=5).generate(PAYLOAD, timeout_s=0.05)


async def test_deadline_covers_all_attempts():
    async with fake_engine(lambda payload, number: Reply(status=503)) as engine:
        client = EngineClient(engine.url, timeout_s=1.0, max_retries=10**6)
        with pytest.raises(EngineUnavailable, match=r"attempts; last: status 503: scripted error"):
            await client.generate(PAYLOAD)
    assert len(engine.requests) > 1


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, "model_not_found"),
        (500, "call_upstream_connection_failed"),
        (500, "read_response_body_failed"),
    ],
)
async def test_a_router_that_lost_its_engines_is_asked_again(status: int, code: str):
    # As smg 1.13 answers while it knows no engine, and when an engine dies under a request.
    body = b'{"error":{"type":"server_error","code":"%s","message":"x"}}' % code.encode()
    async with fake_engine(first(Reply(status=status, body=body))) as engine:
        await EngineClient(engine.url, timeout_s=5).generate(PAYLOAD)
    assert len(engine.requests) == 2


async def test_another_404_is_a_refusal():
    async with fake_engine(first(Reply(status=404, body=b"no such path"))) as engine:
        with pytest.raises(EngineProtocolError, match="status 404"):
            await EngineClient(engine.url, timeout_s=5).generate(PAYLOAD)


async def test_attempts_have_no_limit_but_the_deadline():
    replies = [Reply(status=503)] * 100
    async with fake_engine(lambda payload, number: (*replies, Reply())[number]) as engine:
        await EngineClient(engine.url, timeout_s=30).generate(PAYLOAD)
    assert len(engine.requests) == 101
    assert all(request == PAYLOAD for request in engine.requests)  # the same seeds each time


async def test_retries_end():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(EngineUnavailable, match="failed 3 times, last: cannot connect"):
            await EngineClient(url, timeout_s=5, max_retries=2).generate(PAYLOAD)
    await close_clients()


async def test_address_that_is_none_is_refused():
    with pytest.raises(EngineProtocolError, match="no http://host:port address"):
        await EngineClient("nonsense", timeout_s=5).get("/x")
    await close_clients()


async def test_plain_text_answer_becomes_a_message():
    async with fake_engine() as engine:
        client = EngineClient("http://127.0.0.1:1", timeout_s=5)
        assert await client.post(f"{engine.url}/abort_request", {"abort_all": True}) == {
            "message": ""
        }
        assert await client.get(f"{engine.url}/server_info") == {"slime_engine": "fake"}


async def test_more_requests_than_connections_wait_their_turn():
    async with fake_engine() as engine:
        client = EngineClient(engine.url, timeout_s=5, max_connections=2)
        answers = await asyncio.gather(*(client.generate(PAYLOAD) for _ in range(20)))
    assert len(answers) == len(engine.requests) == 20


async def test_post_and_get_of_users_share_one_client():
    async with fake_engine(first(Reply(disconnect=True))) as engine:
        answer = await post(f"{engine.url}/generate", PAYLOAD, headers={"X-A": "b"})
        assert await get(f"{engine.url}/server_info") == {"slime_engine": "fake"}
        engine.on_generate = lambda payload, number: Reply(status=503)
        with pytest.raises(EngineUnavailable, match="failed 1 times"):
            await post(f"{engine.url}/generate", PAYLOAD, max_retries=0)
    assert answer["meta_info"]["completion_tokens"] == 3
    assert engine.headers[1]["X-A"] == "b"


async def test_one_client_serves_several_event_loops():
    client = EngineClient("", timeout_s=5)

    async def ask() -> None:
        async with fake_engine() as engine:
            assert await client.get(f"{engine.url}/server_info") == {"slime_engine": "fake"}

    await ask()
    await asyncio.to_thread(lambda: asyncio.run(ask()))
    await ask()


async def test_many_large_answers_are_read_one_in_each_turn_of_the_loop():
    large, turns = "x" * client_module.LARGE_BYTES, 0
    read: list[int] = []
    body = orjson.dumps({"meta_info": {}, "text": large})

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def ask(client: EngineClient) -> None:
        answer = await client.generate(PAYLOAD)
        assert isinstance(answer, dict)
        assert answer["text"] == large
        read.append(turns)

    async with fake_engine(lambda payload, number: Reply(body=body)) as engine:
        client = EngineClient(engine.url, max_connections=40, timeout_s=10)
        counting = asyncio.create_task(count_turns())
        await asyncio.gather(*(ask(client) for _ in range(40)))
        counting.cancel()
    assert len(set(read)) == 40
