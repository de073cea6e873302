"""JSON over aiohttp: bodies, answers, errors as status codes, and the API key."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from slime.engines.protocol import Endpoint, Json, error_answer, update_answer
from slime.errors import (
    CheckpointError,
    EngineError,
    EngineProtocolError,
    EngineUnavailable,
    WeightSyncError,
)

logger = logging.getLogger(__name__)

# Routers and watchers probe without a key; it tells no more than that the process lives.
_OPEN_PATHS = frozenset({Endpoint.HEALTH})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def read_body(http: web.Request) -> Any:
    """The decoded body; an empty one is an empty object.

    Raises:
        EngineProtocolError: it is no JSON.
    """
    raw = await http.read()
    try:
        return orjson.loads(raw) if raw.strip() else {}
    except orjson.JSONDecodeError as error:
        raise EngineProtocolError(f"the body of {http.path} is no JSON: {error}") from error


def json_answer(content: Any, status: int = 200) -> web.Response:
    """A response with `content` as JSON."""
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")


def posted(handle: Callable[[Json], Awaitable[Json]]) -> Handler:
    """A handler that feeds a request's body to `handle`; status 400 when that reports no success."""

    async def handler(http: web.Request) -> web.Response:
        content = await handle(await read_body(http))
        return json_answer(content, 400 if content.get("success") is False else 200)

    return handler


def info_page(handle: Callable[[], Any]) -> Handler:
    """A handler that answers with what `handle` returns."""

    async def handler(_: web.Request) -> web.Response:
        return json_answer(handle())

    return handler


def demand_key(api_key: str) -> Any:
    """Middleware that lets nobody in without the key, except to see whether the engine lives."""
    # Bytes: compare_digest refuses text that is not ASCII, and a caller may send any.
    expected = f"Bearer {api_key}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if request.path not in _OPEN_PATHS and not hmac.compare_digest(given, expected):
            return json_answer(error_answer("wrong or missing API key", "Unauthorized"), 401)
        return await handler(request)

    return check


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors a caller can act on, with their status; anything else stays a 500 with a traceback."""
    try:
        return await handler(request)
    except (CheckpointError, WeightSyncError) as error:
        logger.error("%s: %s", request.path, error)
        return json_answer(update_answer(False, str(error)), 400)
    except EngineProtocolError as error:
        logger.warning("%s refused: %s", request.path, error)
        return json_answer(error_answer(str(error), "BadRequestError"), 400)
    except (EngineUnavailable, TimeoutError) as error:
        return json_answer(error_answer(str(error) or "timeout", "ServiceUnavailable"), 503)
    except EngineError as error:
        logger.error("%s: %s", request.path, error)
        return json_answer(error_answer(str(error), "InternalServerError"), 500)
