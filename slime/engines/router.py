"""The router in front of the engines: start one (`smg`, the successor of sglang-router) or adopt a running one.

Chosen over sglang-router 0.3.2, which rebuilds the body of /generate and drops unknown top-level
fields such as `return_routed_experts` and `sampling_seeds`; smg 1.13 keeps them
(tests/contracts/test_router_passthrough.py).
"""

import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from slime.config.api_key import API_KEY_VARIABLE, run_api_key
from slime.config.routing import router_options
from slime.engines.ports import hold_port
from slime.engines.servers import (
    HEALTH_POLL_S,
    ServerProcess,
    ServerSpec,
    command_line,
)
from slime.errors import EngineProtocolError, EngineUnavailable

# Status of an answer to POST /workers for an address the router has.
KNOWN_ALREADY = 409
CALL_TIMEOUT_S = 10.0

# One miss costs a retry; with these a dead engine is out within seconds and back as soon as it
# answers again.
DEFAULT_OPTIONS: dict[str, Any] = {
    "log_level": "warn",
    "balance_abs_threshold": 10,
    "balance_rel_threshold": 1.2,
    "prometheus_host": "127.0.0.1",
    "worker_startup_check_interval": 1,
    "health_check_interval_secs": 2,
    "health_failure_threshold": 2,
    "health_success_threshold": 1,
    "cb_failure_threshold": 3,
    "cb_timeout_duration_secs": 2,
    # Requests that still run when the run ends have nobody left to read their answers.
    "shutdown_grace_period_secs": 0,
}


class Router:
    """The router's address and, when we started it, its process."""

    def __init__(self, url: str, process: ServerProcess | None = None) -> None:
        self.url = url
        self.process = process

    @property
    def is_ours(self) -> bool:
        """Whether we started it; an adopted router is watched by its owner."""
        return self.process is not None

    @property
    def is_dead(self) -> bool:
        """Whether the process we started has ended."""
        return self.process is not None and not self.process.is_alive()

    def restart(self, timeout_s: float) -> None:
        """Start the router again at its old address; it knows no engine then.

        Raises:
            EngineUnavailable: it did not come up; carries the end of its log.
        """
        assert self.process is not None, "an adopted router is not ours to start"
        self.process.kill()
        self.process = ServerProcess(self.process.spec)
        self.process.wait_healthy(timeout_s)

    @classmethod
    def start(
        cls,
        *,
        host: str,
        log_path: Path,
        options: dict[str, Any],
        request_timeout_s: float,
        timeout_s: float,
    ) -> "Router":
        """Start a router on a free port of `host`.

        Args:
            options: `--router-*` options without the prefix; `router_options` fills in a policy.
            request_timeout_s: deadline of one forwarded request.
            timeout_s: deadline of the start.

        Raises:
            EngineUnavailable: it did not come up.
        """
        port = int(options.get("port") or hold_port(host))
        merged = {
            **DEFAULT_OPTIONS,
            "request_timeout_secs": int(request_timeout_s),
            "prometheus_port": hold_port(host),
            **router_options(options),
            "host": host,
            "port": port,
        }
        key = merged.pop("api_key", None)
        spec = ServerSpec(
            name="router",
            command=(sys.executable, "-m", "slime.engines.router_server", *command_line(merged)),
            url=f"http://{host}:{port}",
            health_path="/liveness",
            log_path=log_path,
            env={API_KEY_VARIABLE: str(key)} if key else {},
        )
        process = ServerProcess(spec)
        process.wait_healthy(timeout_s)
        return cls(spec.url, process)

    def add_engines(self, urls: Sequence[str], timeout_s: float) -> None:
        """Register engines and return once the router calls all of them healthy.

        Raises:
            EngineUnavailable: an engine was not accepted within `timeout_s`; names it.
        """
        deadline = time.monotonic() + timeout_s
        key = run_api_key()
        body = {"worker_type": "regular"} | ({"api_key": key} if key else {})
        with self._http(timeout_s) as http:
            for url in urls:
                reply = http.post("/workers", json={"url": url, **body})
                if reply.status_code >= 300 and reply.status_code != KNOWN_ALREADY:
                    raise EngineProtocolError(
                        f"the router {self.url} refused engine {url}: {reply.status_code} {reply.text[:300]}"
                    )
            while missing := set(urls) - self._healthy(http):
                if time.monotonic() > deadline:
                    raise EngineUnavailable(
                        f"the router {self.url} did not accept {', '.join(sorted(missing))} within {timeout_s:.0f} s; "
                        "is each engine reachable from the router's host?"
                    )
                time.sleep(HEALTH_POLL_S)

    def remove_engine(self, url: str) -> None:
        """Ask the router to forget an engine; one it does not know is no error.

        Raises:
            EngineUnavailable: the router did not answer.
        """
        with self._http(CALL_TIMEOUT_S) as http:
            for worker in http.get("/workers").json().get("workers", []):
                if worker["url"] == url:
                    http.delete(f"/workers/{worker['id']}")

    def stop(self) -> None:
        """End the router if we started it; an adopted one is left alone."""
        if self.process is not None:
            self.process.stop()

    @contextmanager
    def _http(self, timeout_s: float) -> Generator[httpx.Client]:
        key = run_api_key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            with httpx.Client(
                base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False
            ) as http:
                yield http
        except httpx.HTTPError as error:
            raise EngineUnavailable(f"the router {self.url} does not answer: {error!r}") from error

    def _healthy(self, http: httpx.Client) -> set[str]:
        workers = http.get("/workers").json().get("workers", [])
        return {worker["url"] for worker in workers if worker.get("is_healthy")}
