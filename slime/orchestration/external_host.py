"""An engine that somebody else runs: adopted, asked whether it lives, never started or ended."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import httpx

from slime.config.api_key import run_api_key
from slime.engines.external import Wanted, adopt, is_of_run
from slime.engines.servers import HEALTH_POLL_S
from slime.errors import ConfigError, EngineError, EngineUnavailable

logger = logging.getLogger(__name__)

# Answered by the server itself, whatever its model is at.
ALIVE_PATH = "/model_info"
ASK_TIMEOUT_S = 5.0
# A busy host may be slow; one that is silent for so long has gone or hangs.
SILENCE_S = 30.0
RETRY_S = 1.0


class ExternalHost:
    """An `EngineHost` over HTTP alone; its methods are called by one thread at a time.

    Args:
        url: of the server.
        wanted: what it must be.
    """

    def __init__(self, url: str, wanted: Wanted) -> None:
        self._url = url
        self._wanted = wanted
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="external-engine")
        key = run_api_key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(timeout=ASK_TIMEOUT_S, headers=headers, trust_env=False)
        self._adoption: Future[None] | None = None
        self._next_try = 0.0
        self._said = ""
        self._probe: Future[str | None] | None = None
        self._silent_since: float | None = None

    @property
    def is_ours(self) -> bool:
        """As `EngineHost`."""
        return False

    @property
    def starting(self) -> dict[str, Any]:
        """No start is under way: that is its owner's business."""
        return {}

    def first_url(self, timeout_s: float) -> str:
        """Its address, once it is adopted.

        Raises:
            EngineUnavailable: it does not answer within `timeout_s`.
            ConfigError: it does not fit.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                adopt(self._url, self._wanted, timeout_s=ASK_TIMEOUT_S)
                return self._url
            except EngineError as error:
                if time.monotonic() > deadline:
                    raise EngineUnavailable(
                        f"--rollout-external-engine-addrs: {self._url} could not be adopted within "
                        f"--startup-timeout-s: {error} A server that wants a key gets the one of "
                        "--sglang-api-key or SLIME_API_KEY."
                    ) from error
            time.sleep(HEALTH_POLL_S)

    def begin_start(self) -> None:
        """As `EngineHost`: from now on `started` tells when it is there again."""
        self._adoption = self._probe = self._silent_since = None

    def started(self) -> str | None:
        """As `EngineHost`; one that came back and does not fit is not there either."""
        if self._adoption is None:
            if time.monotonic() < self._next_try:
                return None
            self._adoption = self._pool.submit(
                adopt, self._url, self._wanted, timeout_s=ASK_TIMEOUT_S
            )
        if not self._adoption.done():
            return None
        adoption, self._adoption = self._adoption, None
        self._next_try = time.monotonic() + RETRY_S
        try:
            adoption.result()
        except EngineError:
            return None
        except ConfigError as error:
            if self._said != str(error):
                logger.error("an engine came back as another: %s", error)
            self._said = str(error)
            return None
        return self._url

    def death(self, wait_s: float) -> str | None:
        """As `EngineHost`."""
        if self._probe is None:
            self._probe = self._pool.submit(self._ask)
        wait([self._probe], timeout=wait_s)
        if not self._probe.done():
            return None
        probe, self._probe = self._probe, None
        return probe.result()

    def stop(self) -> dict[str, Any]:
        """Leave it as it is."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()
        return {}

    def _ask(self) -> str | None:
        """Why it is not this run's engine any more; None when it is, or when nobody can tell yet."""
        try:
            reply = self._http.get(self._url + ALIVE_PATH)
            reply.raise_for_status()
            version = str(reply.json().get("weight_version"))
        except httpx.ConnectError as error:
            return f"nobody answers there ({error})"
        except (httpx.HTTPError, ValueError) as error:
            now = time.monotonic()
            self._silent_since = self._silent_since or now
            silence = now - self._silent_since
            return (
                f"no good answer for {silence:.0f} s ({error!r})" if silence > SILENCE_S else None
            )
        self._silent_since = None
        if is_of_run(version, self._wanted.run):
            return None
        return (
            f"its weights have the version {version!r}, which this run did not give: it was started "
            "again, or another run uses it"
        )
