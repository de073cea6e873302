"""EngineClient: asynchronous JSON over HTTP to router and engines, with retries and deadlines."""

import asyncio
import functools
import logging
import math
from asyncio import AbstractEventLoop
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import aiohttp
import orjson

from slime.config.api_key import run_api_key
from slime.engines.dropped import dropped_answer, is_dropped
from slime.engines.gate import gate
from slime.engines.request_scope import current_scope
from slime.errors import EngineError, EngineProtocolError, EngineUnavailable
from slime.observability.waits import WARN_FRACTION, waiting

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 1800.0
# The router and a starting engine answer these while they cannot serve; the request itself is fine.
# 499: SGLang dropped a request that waited for the end of a pause.
RETRIED_STATUS = frozenset({429, 499, 502, 503, 504})
# Codes in answers of the router (smg 1.13) that blame the fleet and not the request. 404: it knows no
# engine at all, as all of them died, or it was itself started again and they are being registered.
# 500: its connection to an engine broke, and its own retries had no better luck. An engine's own
# 404 or 500 has no such code.
ROUTER_CODES: dict[int, tuple[bytes, ...]] = {
    404: (b'"code":"model_not_found"',),
    500: (b'"code":"call_upstream_', b'"code":"read_response_'),
}
FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
# uvicorn drops idle connections after 5 s: let go first, or a request meets a closing connection.
KEEPALIVE_S = 3.0
SHOWN_CHARS = 300
# Requests are sent, and answers from this size on read, one in each turn of the event loop: 4,096 tokens with
# log-probs, 0.2 MB, take 2 ms, and thousands of them can be there at once.
LARGE_BYTES = 16_384
# The deadline is `EngineClient._call`'s; aiohttp's own of 5 minutes would cut long answers.
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """One call.

    Attributes:
        resend: allows another attempt after the connection broke on the way.
        gated: it makes one of the run's engines generate.
    """

    method: str
    url: str
    body: bytes | None
    headers: Mapping[str, str] | None
    resend: bool
    gated: bool = False

    def __str__(self) -> str:
        return f"{self.method} {self.url}"


@dataclass(frozen=True)
class _Reply:
    status: int
    body: bytes


class EngineClient:
    """Sends requests below one base address; has a connection pool on each event loop using it.

    Args:
        base_url: `http://host:port`; a path that is a whole address of its own replaces it.
        timeout_s: deadline of one call, all its retries included, seconds.
        max_connections: requests in flight at once; more wait inside their deadline.
        api_key: sent as a bearer token with every call. By default the run's key, which goes to
            `base_url` and to the addresses of `trust_with_key` only.
        max_retries: attempts after the first one; None tries until the deadline, which is what a
            fleet needs whose engines may take minutes to come back.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_connections: int = 1024,
        api_key: str | None = None,
        max_retries: int | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout_s = timeout_s
        self.max_connections = max_connections
        self.max_retries = max_retries
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        elif base_url:
            trust_with_key(base_url)
        self._sessions: WeakKeyDictionary[AbstractEventLoop, aiohttp.ClientSession] = (
            WeakKeyDictionary()
        )

    async def generate(
        self,
        payload: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The answer to POST /generate: one object, or a list of them for n > 1 or many prompts.

        A connection lost on the way is tried again too: with the same seed an engine writes the
        same tokens.

        Raises:
            EngineUnavailable: no answer within the deadline.
            EngineProtocolError: the request was refused, or an answer lacks `meta_info`.
            EngineError: the server failed (status 500).
        """
        url = self._url("/generate")
        answer = await self.post(url, payload, headers=headers, timeout_s=timeout_s, resend=True)
        parts: list[Any] = cast(list[Any], answer) if isinstance(answer, list) else [answer]
        for part in parts:
            if not isinstance(part, dict) or not isinstance(part.get("meta_info"), dict):  # pyright: ignore[reportUnknownMemberType]
                raise EngineProtocolError(
                    f"POST {url} answered without meta_info: {_shown(orjson.dumps(part))}; is this "
                    "address a router or an engine that speaks SGLang's /generate?"
                )
        return cast(dict[str, Any] | list[dict[str, Any]], answer)

    async def post(
        self,
        path: str,
        payload: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        resend: bool = False,
        max_retries: int | None = None,
    ) -> Any:
        """The JSON answer to POST `path`; text that is no JSON comes as `{"message": text}`.

        Args:
            payload: becomes JSON; None is an empty object. A /generate to the run's own router or
                engines gets a seed and is counted where a `request_scope` runs.
            resend: try again also when the connection breaks after the request was sent. Off by
                default: the call may have had its effect.
            max_retries, timeout_s: instead of the client's own.

        Raises: as `generate`, without the check for `meta_info`.
        """
        url = self._url(path)
        gated = url.endswith("/generate") and _origin(url) in _trusted  # not a judge's
        scope = current_scope() if gated else None
        if scope is not None and scope.seeds is not None:
            payload = scope.seeds.applied(payload)
        body = orjson.dumps({} if payload is None else payload, option=orjson.OPT_SERIALIZE_NUMPY)
        request = _Request(
            method="POST", url=url, body=body, headers=headers, resend=resend, gated=gated
        )
        if scope is None:
            return await self._call(request, timeout_s, max_retries)
        with scope.usage.waiting():
            answer = await self._call(request, timeout_s, max_retries)
        scope.usage.add_answer(answer)
        return answer

    async def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """The JSON answer to GET `path`; raises like `post`."""
        request = _Request(method="GET", url=self._url(path), body=None, headers=None, resend=True)
        return await self._call(request, timeout_s, None)

    async def aclose(self) -> None:
        """Close the connections of the running event loop; a later call opens new ones."""
        loop = asyncio.get_running_loop()
        session = self._sessions.pop(loop, None)
        if session is not None:
            _open_sessions.get(loop, set[aiohttp.ClientSession]()).discard(session)
            await session.close()

    def _url(self, path: str) -> str:
        return path if "://" in path else f"{self.base_url}/{path.lstrip('/')}"

    def _session(self) -> aiohttp.ClientSession:
        """The session of the running loop; aiohttp sessions cannot be shared between loops."""
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None or session.closed:
            connector = aiohttp.TCPConnector(
                limit=self.max_connections, keepalive_timeout=KEEPALIVE_S
            )
            # trust_env stays False: a proxy from the environment must never see engine traffic.
            session = aiohttp.ClientSession(connector=connector, headers=self._headers)
            self._sessions[loop] = session
            _open_sessions.setdefault(loop, set()).add(session)
        return session

    async def _call(
        self, request: _Request, timeout_s: float | None, max_retries: int | None
    ) -> Any:
        """The decoded answer, after as many attempts as deadline and `max_retries` allow."""
        budget_s = self.timeout_s if timeout_s is None else timeout_s
        retries = self.max_retries if max_retries is None else max_retries
        attempts = math.inf if retries is None else 1 + retries
        attempt, last = 0, "none failed"
        origin = _origin(request.url)
        # A long answer takes minutes: late is what has used up a part of its own deadline.
        wait = waiting(
            origin,
            f"answer {request.method} {request.url.removeprefix(origin)}",
            deadline_s=budget_s,
            warn_after_s=WARN_FRACTION * budget_s,
        )
        try:
            with wait:
                async with asyncio.timeout(budget_s):
                    while attempt < attempts:
                        if attempt:
                            # The exponent has a limit, or the power would leave the floats.
                            backoff_s = FIRST_BACKOFF_S * 2 ** min(attempt - 1, 20)
                            await asyncio.sleep(min(backoff_s, MAX_BACKOFF_S))
                        attempt += 1
                        await _own_turn()
                        async with gate.request() if request.gated else nullcontext():
                            reply = await self._try_once(request)
                        if isinstance(reply, _Reply):
                            if len(reply.body) >= LARGE_BYTES:
                                await _own_turn()
                            return _decoded(request, reply)
                        last = reply
                        logger.debug("%s, attempt %d: %s", request, attempt, last)
        except TimeoutError:
            raise EngineUnavailable(
                f"{request}: no answer within {budget_s:g} s ({attempt} attempts; last: {last}); "
                "is the server alive, and is the deadline (--request-timeout-s) long enough?"
            ) from None
        raise EngineUnavailable(
            f"{request} failed {attempt} times, last: {last}; is the server alive and reachable?"
        )

    async def _try_once(self, request: _Request) -> _Reply | str:
        """A reply to hand on, or why another attempt is worth it."""
        try:
            async with self._session().request(
                request.method,
                request.url,
                data=request.body,
                headers=_run_key_header(request.url) | dict(request.headers or {}),
                timeout=_NO_TIMEOUT,
            ) as http:
                reply = _Reply(http.status, await http.read())
        except aiohttp.InvalidURL as error:
            raise EngineProtocolError(f"{request.url!r} is no http://host:port address") from error
        except aiohttp.ClientConnectorError as error:
            return f"cannot connect ({error})"
        except aiohttp.ClientError as error:
            if not request.resend:
                raise EngineUnavailable(
                    f"{request}: the connection broke before the answer ({error!r}); not sent "
                    "again, as the call may have had its effect"
                ) from error
            return f"the connection broke ({error!r})"
        if reply.status in RETRIED_STATUS or _is_fleet_fault(reply):
            return f"status {reply.status}: {_shown(reply.body)}"
        return reply


# Where the run's key may go. A user's function may post to a judge with the same client, and the
# key is none of the judge's business.
_trusted: set[str] = set()


def trust_with_key(*urls: str) -> None:
    """Let clients of this process send the run's API key to these addresses: router and engines."""
    _trusted.update(_origin(url) for url in urls)


def _run_key_header(url: str) -> dict[str, str]:
    key = run_api_key()
    return {"Authorization": f"Bearer {key}"} if key and _origin(url) in _trusted else {}


@functools.lru_cache(maxsize=1024)
def _origin(url: str) -> str:
    """`http://host:port` of an address."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}".lower()


def _is_fleet_fault(reply: _Reply) -> bool:
    return any(code in reply.body for code in ROUTER_CODES.get(reply.status, ()))


def _decoded(request: _Request, reply: _Reply) -> Any:
    """The JSON of a reply with a good status; of a dropped request, that of an aborted one."""
    if request.url.endswith("/generate") and is_dropped(reply.status, reply.body):
        return dropped_answer(orjson.loads(request.body or b"{}"))
    if 400 <= reply.status < 500:
        raise EngineProtocolError(
            f"{request} was refused with status {reply.status}: {_shown(reply.body)}"
        )
    if reply.status >= 300:
        raise EngineError(
            f"{request} failed with status {reply.status}: {_shown(reply.body)}; the server's log "
            "has the reason"
        )
    text = reply.body.strip()
    if not text.startswith((b"{", b"[")):
        # SGLang answers some control calls with a sentence, or with nothing.
        return {"message": text.decode(errors="replace")}
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise EngineProtocolError(
            f"{request} answered something that is no JSON: {_shown(reply.body)}"
        ) from error


_turns: WeakKeyDictionary[AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


async def _own_turn() -> None:
    """Return in a turn of the event loop that no other caller gets; first come, first served."""
    turn = _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())
    async with turn:
        await asyncio.sleep(0)


def _shown(body: bytes) -> str:
    text = body.decode(errors="replace")
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + " ..."


# All that is open on each loop, for `close_clients`: a client may be gone before its session.
_open_sessions: WeakKeyDictionary[AbstractEventLoop, set[aiohttp.ClientSession]] = (
    WeakKeyDictionary()
)


async def close_clients() -> None:
    """Close every connection opened on the running event loop; call it before the loop ends."""
    for session in _open_sessions.pop(asyncio.get_running_loop(), set[aiohttp.ClientSession]()):
        await session.close()


# --- one shared client per event loop, for functions of users ---

_shared: WeakKeyDictionary[AbstractEventLoop, EngineClient] = WeakKeyDictionary()


def _shared_client() -> EngineClient:
    return _shared.setdefault(asyncio.get_running_loop(), EngineClient(""))


async def post(
    url: str,
    payload: Any,
    max_retries: int = 60,
    headers: Mapping[str, str] | None = None,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Any:
    """The JSON answer to POST `url`, sent through the client all callers on this event loop share.

    For custom generate functions: a lost connection is sent again, as to `/generate`.

    Raises: as `EngineClient.generate`.
    """
    client = _shared_client()
    return await client.post(
        url, payload, headers=headers, timeout_s=timeout_s, resend=True, max_retries=max_retries
    )


async def get(url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Any:
    """The JSON answer to GET `url` through the shared client; raises like `post`."""
    return await _shared_client().get(url, timeout_s=timeout_s)
