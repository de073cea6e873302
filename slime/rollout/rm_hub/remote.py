"""`--rm-type remote_rm`: ask a server at --rm-url."""

import asyncio
import random
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import httpx

from slime.data.sample import Sample
from slime.errors import ConfigError, DeadlineExceeded, RewardError

MAX_ATTEMPTS = 10
MAX_BACKOFF_S = 30.0
MAX_CONNECTIONS = 64
REQUEST_TIMEOUT_S = 120.0

# A client belongs to the event loop that made its connections.
_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()


async def reward(args: Any, sample: Sample) -> Any:
    """The JSON that the server answers to {"prompt", "response", "label"}: a number or a dict.

    Up to 10 attempts with growing pauses, all within `reward_timeout_s`. Retried are connection
    errors, timeouts, and the codes 408, 429 and 5xx; any other code is the final word.

    Raises:
        ConfigError: --rm-url is missing.
        RewardError: the server refused, or answered something that is no JSON.
        DeadlineExceeded: no answer within `reward_timeout_s`.
    """
    if not args.rm_url:
        raise ConfigError("--rm-type remote_rm needs the server's address: --rm-url http://...")
    payload = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
    failures: list[str] = []
    try:
        async with asyncio.timeout(args.reward_timeout_s):
            response = await post(args.rm_url, payload, failures)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"{args.rm_url} gave no reward within {args.reward_timeout_s:g} s; "
            f"{len(failures)} attempts failed before, at last with: {failures[-1:] or 'none'}"
        ) from error
    try:
        return response.json()
    except ValueError as error:
        raise RewardError(f"{args.rm_url} answered no JSON: {response.text[:200]!r}") from error


async def post(
    url: str,
    payload: dict[str, Any],
    failures: list[str],
    *,
    headers: Mapping[str, str] | None = None,
) -> httpx.Response:
    """The first good answer; what went wrong before is added to `failures`.

    Raises:
        RewardError: a final refusal, or the last of 10 attempts failed.
    """
    for attempt in range(MAX_ATTEMPTS):
        try:
            response = await _client().post(url, json=payload, headers=headers)
            if response.is_success:
                return response
            failures.append(f"HTTP {response.status_code}: {response.text[:200]}")
            if response.status_code not in (408, 429) and response.status_code < 500:
                break
        except httpx.TransportError as error:
            failures.append(f"{type(error).__name__}: {error}")
        # With jitter, so that a thousand samples do not come back at the same moment.
        await asyncio.sleep(min(2.0**attempt, MAX_BACKOFF_S) * random.uniform(0.25, 0.5))
    raise RewardError(f"{url} gave no reward after {len(failures)} attempts: {failures[-1]}")


def _client() -> httpx.AsyncClient:
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS)
        # Waiting for a free connection is no failure, so `pool` has no limit of its own.
        timeout = httpx.Timeout(REQUEST_TIMEOUT_S, pool=None)
        _clients[loop] = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)
    return _clients[loop]
