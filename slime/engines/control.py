"""Control calls to a set of engines: pause, sync, resume.

They go to each engine directly; the router forwards none of them.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import orjson

from slime.config.api_key import run_api_key
from slime.engines.protocol import PauseMode
from slime.errors import EngineProtocolError, EngineUnavailable
from slime.observability.doctor import late_report
from slime.observability.waits import waiting

Answer = dict[str, Any]

# Requests that were told to end do so with their next token.
DRAIN_S = 0.5
DRAIN_POLL_S = 0.005


class EngineControl:
    """Blocking control calls, sent to all engines at once; every call has a deadline and names the engine that failed.

    Args:
        urls: base address of each engine, `http://host:port`.
        timeout_s: deadline of one call on all engines, seconds.
        api_key: sent as a bearer token; by default the run's.
    """

    def __init__(
        self, urls: Sequence[str], *, timeout_s: float, api_key: str | None = None
    ) -> None:
        self.urls = tuple(urls)
        self.timeout_s = timeout_s
        key = api_key or run_api_key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # trust_env=False: a proxy from the environment must never see engine traffic.
        self._http = httpx.Client(timeout=timeout_s, headers=headers, trust_env=False)
        self._pool = ThreadPoolExecutor(
            max_workers=max(1, len(urls)), thread_name_prefix="engine-control"
        )

    def post_all(
        self, path: str, payload: Answer | Callable[[int], Answer] | None = None
    ) -> list[Answer]:
        """Answers of all engines to POST `path`, in the order of `urls`.

        Args:
            path: for instance `/pause_generation`.
            payload: the body, or a function from the engine's position to its body.

        Raises:
            EngineUnavailable: an engine did not answer in time.
            EngineProtocolError: an engine refused, or answered something that is no JSON object.
        """
        return collect(self.start_post_all(path, payload))

    def start_post_all(
        self, path: str, payload: Answer | Callable[[int], Answer] | None = None
    ) -> list["Future[Answer]"]:
        """`post_all` without waiting, for calls that run beside a collective."""
        bodies = [payload(i) if callable(payload) else payload or {} for i in range(len(self.urls))]
        return [
            self._pool.submit(self._call, "POST", url + path, body)
            for url, body in zip(self.urls, bodies, strict=True)
        ]

    def get_all(self, path: str, *, timeout_s: float | None = None) -> list[Answer]:
        """Answers of all engines to GET `path`; raises like `post_all`.

        Args:
            timeout_s: instead of the usual deadline.
        """
        calls = [
            self._pool.submit(self._call, "GET", url + path, None, timeout_s) for url in self.urls
        ]
        return collect(calls)

    def pause(self, mode: str) -> None:
        """Stop generating on all engines; `mode` is abort, retract or in_place."""
        if mode == PauseMode.ABORT:
            # SGLang's pause looks once a second whether all requests have ended: end them before.
            self.post_all("/abort_request", {"abort_all": True})
            self._until_idle()
        self.post_all("/pause_generation", {"mode": mode})

    def _until_idle(self) -> None:
        """Return once no engine has a request, or DRAIN_S has passed: the pause itself is sure."""
        deadline = time.monotonic() + DRAIN_S
        while time.monotonic() < deadline:
            loads = [answer["loads"] for answer in self.get_all("/v1/loads?include=core")]
            if not any(_has_requests(load) for per_rank in loads for load in per_rank):
                return
            time.sleep(DRAIN_POLL_S)

    def resume(self) -> None:
        """Let all engines generate again."""
        self.post_all("/continue_generation")

    def close(self) -> None:
        """Close connections and threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def _call(
        self, method: str, url: str, body: Answer | None, timeout_s: float | None = None
    ) -> Answer:
        start = time.monotonic()
        deadline_s = self.timeout_s if timeout_s is None else timeout_s
        try:
            content = None if body is None else orjson.dumps(body)
            with waiting(*_wait_names(method, url), deadline_s=deadline_s):
                reply = self._http.request(
                    method,
                    url,
                    content=content,
                    headers={"Content-Type": "application/json"},
                    timeout=deadline_s,
                )
        except httpx.HTTPError as error:
            waited = time.monotonic() - start
            message = (
                f"{method} {url}: no answer after {waited:.1f} s ({error!r}); is the engine's process alive? "
                "Its log is in the run folder under logs/."
            )
            if isinstance(error, httpx.TimeoutException):
                message = late_report(message)
            raise EngineUnavailable(message) from error
        return _answer(method, url, reply)


def _has_requests(load: Answer) -> bool:
    return load["num_running_reqs"] + load["num_waiting_reqs"] > 0


def _wait_names(method: str, url: str) -> tuple[str, str]:
    """Whom a call waits for, and for what."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    return f"{scheme}://{host}", f"answer {method} /{path}"


def collect(futures: Sequence["Future[Answer]"]) -> list[Answer]:
    """Results of all futures; the first error after every call has ended, so that none is left running."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


def _answer(method: str, url: str, reply: httpx.Response) -> Answer:
    """The JSON object of a reply; an empty 200 counts as an empty object (SGLang answers some calls so)."""
    if reply.status_code != 200:
        raise EngineProtocolError(
            f"{method} {url} was refused with status {reply.status_code}: {reply.text[:500]}"
        )
    text = reply.text.strip()
    if not text.startswith("{"):
        return {"message": text}
    try:
        answer: Answer = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise EngineProtocolError(
            f"{method} {url} answered something that is no JSON: {text[:200]!r}"
        ) from error
    if answer.get("success") is False:
        raise EngineProtocolError(
            f"{method} {url} failed in the engine: {answer.get('message', text[:500])}"
        )
    return answer
