"""The endpoint: one HTTP server per event loop, there while a session is open, loopback by default."""

import asyncio
import hmac
from asyncio import AbstractEventLoop
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import orjson
from aiohttp import web

from slime.agent.anthropic_messages import AnthropicMessages
from slime.agent.apis import Api, Json
from slime.agent.asked import Answer, ApiError, Ask
from slime.agent.openai_chat import OpenAIChat
from slime.agent.openai_responses import OpenAIResponses
from slime.errors import ConfigError

if TYPE_CHECKING:
    from slime.agent.session import Session

MAX_BODY_BYTES = 1 << 28
# Agents come by the thousand and connect at once.
BACKLOG = 4096
# A stream that has nothing to say yet begins after this long, and says so as often. Before that an
# error still has its own status, which tells clients whether to try again.
KEEP_ALIVE_S = 15.0
SHUTDOWN_S = 1.0


class Server:
    """One endpoint.

    Attributes:
        address: `http://host:port`.
        sessions: open ones, by id.
    """

    def __init__(self, host: str, port: int) -> None:
        self.address = ""
        self.sessions: dict[str, Session] = {}
        self.num_users = 0
        self._host, self._port = host, port
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: nothing can listen there.
        """
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        chat = OpenAIChat()
        claude, responses = AnthropicMessages(), OpenAIResponses()
        base = "/s/{session}/v1"
        app.add_routes(
            [
                web.post(f"{base}/chat/completions", self._handler(chat, _answer)),
                web.post(f"{base}/responses", self._handler(responses, _answer)),
                web.post(f"{base}/messages", self._handler(claude, _answer)),
                web.post(f"{base}/messages/count_tokens", self._handler(claude, _count)),
                web.get(f"{base}/models", self._models),
                web.route("*", "/s/{session}/{path:.*}", self._handler(chat, _nothing)),
            ]
        )
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_S
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port, backlog=BACKLOG).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(
                f"the agents' endpoint cannot listen at {self._host}:{self._port} ({error}); choose "
                "--agent-host and --agent-port otherwise"
            ) from error
        port = self._runner.addresses[0][1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.address = f"http://{host}:{port}"

    async def stop(self) -> None:
        """Stop listening and close all connections."""
        if self._runner is not None:
            await self._runner.cleanup()

    def _handler(self, api: Api, work: "_Work") -> Callable[[web.Request], Awaitable[Any]]:
        async def handle(http: web.Request) -> web.StreamResponse:
            try:
                session = self._session(http)
                try:
                    return await work(api, http, session)
                except (ApiError, ConnectionError):
                    raise
                except Exception as fault:
                    raise session.failed(fault) from fault
            except ApiError as error:
                return _error(api, error)

        return handle

    async def _models(self, http: web.Request) -> web.StreamResponse:
        is_anthropic = "anthropic-version" in http.headers
        try:
            name = self._session(http).model
        except ApiError as error:
            return _error(AnthropicMessages() if is_anthropic else OpenAIResponses(), error)
        if is_anthropic:
            model = {"type": "model", "id": name, "display_name": name}
            model["created_at"] = "1970-01-01T00:00:00Z"
            return _json({"data": [model], "has_more": False, "first_id": name, "last_id": name})
        model = {"id": name, "object": "model", "created": 0, "owned_by": "slime"}
        return _json({"object": "list", "data": [model]})

    def _session(self, http: web.Request) -> "Session":
        """The session that the address names and the key opens.

        Raises:
            ApiError: no such session, or another key.
        """
        session = self.sessions.get(http.match_info.get("session", ""))
        bearer = http.headers.get("Authorization", "").removeprefix("Bearer ")
        given = http.headers.get("x-api-key") or bearer
        expected = "" if session is None else session.api_key
        # Bytes: compare_digest refuses text that is not ASCII, and a caller may send any.
        is_right = hmac.compare_digest(given.encode(errors="surrogateescape"), expected.encode())
        if session is None or not is_right:
            raise ApiError(
                "no open session has this address and this key; take both from the Session object",
                status=401,
                is_final=True,
            )
        return session


_Work = Callable[[Api, web.Request, "Session"], Awaitable[web.StreamResponse]]


async def _answer(api: Api, http: web.Request, session: "Session") -> web.StreamResponse:
    """The model's answer, as JSON or as a stream."""
    ask = api.parse(await _body(http), session)
    if ask.stream:
        return await _stream(api, http, session, ask)
    answer = await session.answer(ask)
    return _json(api.reply(answer, ask, session), headers=_notes(answer))


async def _count(api: Api, http: web.Request, session: "Session") -> web.StreamResponse:
    assert isinstance(api, AnthropicMessages)
    ask = api.parse(await _body(http), session, counting=True)
    return _json({"input_tokens": session.count_tokens(ask)})


async def _nothing(api: Api, http: web.Request, session: "Session") -> web.StreamResponse:
    raise ApiError(
        f"{http.method} {http.path}: there is no such path; below the session's address there are "
        "/v1/chat/completions, /v1/responses, /v1/messages, /v1/messages/count_tokens and /v1/models",
        status=404,
        is_final=True,
    )


async def _stream(api: Api, http: web.Request, session: "Session", ask: Ask) -> web.StreamResponse:
    """Events, all at once when the answer is there: calls are read from whole answers."""
    work = asyncio.create_task(session.answer(ask))
    try:
        await asyncio.wait({work}, timeout=KEEP_ALIVE_S)
        notes = _notes(work.result()) if work.done() else {}
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"} | notes
        response = web.StreamResponse(headers=headers)
        await response.prepare(http)
        while not work.done():
            await response.write(api.keep_alive)
            await asyncio.wait({work}, timeout=KEEP_ALIVE_S)
        try:
            events = b"".join(api.events(work.result(), ask, session))
        except ApiError as error:
            events = api.error_event(error)
        except Exception as fault:  # noqa: BLE001 - `failed` logs it, and its sample fails
            events = api.error_event(session.failed(fault))
        with suppress(ConnectionError):  # the client has gone, and its answer is kept
            await response.write(events)
            await response.write_eof()
        return response
    finally:
        if not work.done():
            work.cancel()


async def _body(http: web.Request) -> Any:
    try:
        raw = await http.read()
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(f"the body is no JSON: {error}") from None
    except web.HTTPRequestEntityTooLarge as error:
        raise ApiError(f"the body has more than {MAX_BODY_BYTES} bytes", status=413) from error


def _notes(answer: Answer) -> dict[str, str]:
    """Headers that tell which of the request's sampling parameters did not hold."""
    return {"x-slime-overridden": ",".join(answer.overridden)} if answer.overridden else {}


def _json(content: Json, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    body = orjson.dumps(content)
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def _error(api: Api, error: ApiError) -> web.Response:
    # Both providers' clients heed this header; else they try some statuses again, with pauses.
    headers = {"x-should-retry": "false"} if error.is_final or error.status < 500 else None
    return _json(api.error(error), api.status(error), headers)


# --- one server per event loop and address, there while somebody uses it ---

_servers: WeakKeyDictionary[AbstractEventLoop, dict[tuple[str, int], Server]] = WeakKeyDictionary()
_locks: WeakKeyDictionary[AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


@asynccontextmanager
async def endpoint(host: str, port: int) -> AsyncGenerator[Server]:
    """The endpoint of the running event loop; the first user starts it, the last one stops it.

    Args:
        port: 0 takes a free one.

    Raises:
        ConfigError: nothing can listen there.
    """
    running = asyncio.get_running_loop()
    lock = _locks.setdefault(running, asyncio.Lock())
    servers = _servers.setdefault(running, {})
    async with lock:
        server = servers.get((host, port))
        if server is None:
            server = Server(host, port)
            await server.start()
            servers[host, port] = server
        server.num_users += 1
    try:
        yield server
    finally:
        async with lock:
            server.num_users -= 1
            if server.num_users == 0:
                del servers[host, port]
                await server.stop()
