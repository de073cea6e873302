"""Health checks of servers: a GET with a deadline, every so often, beside whatever else happens."""

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import httpx

MAX_PARALLEL_CHECKS = 32


@dataclass(frozen=True)
class _Check:
    started: float
    verdict: "Future[str | None]"


class HealthWatch:
    """Checks addresses again and again without waiting for any of them.

    Args:
        interval_s: seconds from one check of an address to its next.
        timeout_s: deadline of one check, seconds.
        first_wait_s: seconds between the first `sweep` with an address and its first check; a
            server may be busy with compiling at first.
        headers: sent with each check.
    """

    def __init__(
        self,
        *,
        interval_s: float,
        timeout_s: float,
        first_wait_s: float = 0.0,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._first_wait_s = first_wait_s
        self._http = httpx.Client(timeout=timeout_s, headers=headers, trust_env=False)
        self._pool = ThreadPoolExecutor(MAX_PARALLEL_CHECKS, thread_name_prefix="health-check")
        self._due: dict[str, float] = {}
        self._running: dict[str, _Check] = {}

    def sweep(self, urls: Iterable[str]) -> dict[str, str]:
        """Those of `urls` whose check failed since the last call, with the reason; starts due checks.

        An address that is left out is forgotten, its running check too: when it comes back, the
        first wait begins anew.
        """
        now = time.monotonic()
        wanted = list(urls)
        for gone in self._due.keys() - set(wanted):
            del self._due[gone]
            self._running.pop(gone, None)
        failed: dict[str, str] = {}
        for url in wanted:
            due = self._due.setdefault(url, now + self._first_wait_s)
            check = self._running.get(url)
            if check is None and now >= due:
                self._running[url] = _Check(now, self._pool.submit(self._check, url))
            elif check is not None and check.verdict.done():
                del self._running[url]
                self._due[url] = check.started + self._interval_s
                if (reason := check.verdict.result()) is not None:
                    failed[url] = reason
        return failed

    def close(self) -> None:
        """End threads and connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def _check(self, url: str) -> str | None:
        """None for a healthy server, or what is wrong."""
        try:
            status = self._http.get(url).status_code
        except httpx.TimeoutException:
            return f"no answer to GET {url} within {self._timeout_s:g} s"
        except httpx.HTTPError as error:
            return f"GET {url} failed: {error!r}"
        return None if status == 200 else f"GET {url} answered status {status}"
