"""EngineWatch: notices engines and routers that die or hang, and starts them again."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from slime.engines.health import HealthWatch
from slime.errors import DeadlineExceeded, EngineUnavailable, SlimeError
from slime.orchestration.engine_host import EngineHost

logger = logging.getLogger(__name__)

HEALTH_PATH = "/health_generate"
ROUTER_HEALTH_PATH = "/liveness"
# An actor answers within milliseconds; one that does not is looked at again in the next poll.
PROBE_WAIT_S = 0.05
SURE_PROBE_WAIT_S = 2.0
REGISTER_TIMEOUT_S = 5.0
BRING_UP_POLL_S = 0.1
# A death may show later than what it did to a request: a process that holds a card takes seconds to go.
DEATH_SHOWS_S = 10.0
# Something that never gets as far as to serve, or dies all the time, will not get better.
MAX_FRUITLESS_STARTS = 5
MAX_STARTS = 20
STARTS_WINDOW_S = 600.0


class RouterSide(Protocol):
    """What the watch needs of a router; `slime.engines.router.Router` has it."""

    url: str

    @property
    def is_ours(self) -> bool: ...
    @property
    def is_dead(self) -> bool: ...
    def restart(self, timeout_s: float) -> None: ...
    def add_engines(self, urls: Sequence[str], timeout_s: float) -> None: ...
    def remove_engine(self, url: str) -> None: ...


class EngineState(StrEnum):
    """STARTING -> UNSYNCED (up, old weights) -> SYNCED (the router does not know it) -> SERVING."""

    STARTING = "starting"
    UNSYNCED = "unsynced"
    SYNCED = "synced"
    SERVING = "serving"
    GIVEN_UP = "given up"


@dataclass
class Starts:
    """How often something was started again, to know when it is hopeless."""

    times: deque[float] = field(default_factory=deque[float])
    num_fruitless: int = 0

    def add(self) -> bool:
        """Note another start; False when there were too many."""
        now = time.monotonic()
        self.times.append(now)
        while now - self.times[0] > STARTS_WINDOW_S:
            self.times.popleft()
        self.num_fruitless += 1
        return self.num_fruitless <= MAX_FRUITLESS_STARTS and len(self.times) <= MAX_STARTS

    def bore_fruit(self) -> None:
        """What was started serves."""
        self.num_fruitless = 0


@dataclass(frozen=True)
class Server:
    """One life of an engine.

    Attributes:
        url: its address; an engine that somebody else runs has the same in all its lives.
        life: 0, and one more after each death.
    """

    url: str
    life: int


@dataclass
class Engine:
    """One engine through all its lives.

    Attributes:
        url: of its present server; empty while that starts.
        lost_at: when the server before it was found dead, by the monotonic clock; None for one
            that serves.
    """

    name: str
    host: EngineHost
    url: str = ""
    state: EngineState = EngineState.STARTING
    lost_at: float | None = None
    life: int = 0
    starts: Starts = field(default_factory=Starts)

    @property
    def server(self) -> Server:
        """Its present server."""
        return Server(self.url, self.life)


class EngineWatch:
    """Books about the engines of a run; `poll` looks at all of them and acts.

    Methods may be called from several threads.

    Args:
        engines: all started, none up yet.
        needs_weights: a restarted engine waits until `admit` says that it has the current weights;
            False when nothing trains and the checkpoint's weights are the current ones.
        health: checks for servers that hang; None leaves those alone.
        timeout_s: deadline of a router's start.

    Attributes:
        urls: addresses of the serving engines, in order; the same list all the time.
        failure: why the watch has given up; None while it has not.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        router: RouterSide,
        *,
        needs_weights: bool,
        health: HealthWatch | None,
        timeout_s: float,
    ) -> None:
        self._engines = tuple(engines)
        self._router = router
        self._needs_weights = needs_weights
        self._health = health
        self._timeout_s = timeout_s
        self._lock = threading.RLock()
        self._router_starts = Starts()
        self._num_rounds = 0
        self._times: list[float] = []
        self._num_restarts = {"engine": 0, "router": 0}
        self.urls: list[str] = []
        self.failure: str | None = None

    def all_serve(self, urls: Sequence[str]) -> None:
        """Note the addresses of the first servers, which the router knows."""
        with self._lock:
            for engine, url in zip(self._engines, urls, strict=True):
                engine.url, engine.state = url, EngineState.SERVING
            self._list_urls()

    def poll(self) -> None:
        """Look at every engine and the router once; start again what is dead."""
        with self._lock:
            if self.failure is not None:
                return
            self._poll_engines(PROBE_WAIT_S)
            self._poll_router()
            self._poll_health()

    def round_begins(self) -> None:
        """Requests are on their way: check for servers that hang."""
        with self._lock:
            self._num_rounds += 1

    def round_ends(self) -> None:
        """Engines may be busy with other things than answering, as a weight sync."""
        with self._lock:
            self._num_rounds -= 1
            self._poll_health()

    @property
    def waiting(self) -> tuple[Server, ...]:
        """Engines that came back and lack the current weights."""
        with self._lock:
            return tuple(e.server for e in self._engines if e.state is EngineState.UNSYNCED)

    def admit(self, servers: Sequence[Server]) -> None:
        """Let engines that now have the current weights serve."""
        with self._lock:
            for engine in self._engines:
                if engine.server in servers and engine.state is EngineState.UNSYNCED:
                    engine.state = EngineState.SYNCED
                    self._register(engine)

    def bring_up(self, timeout_s: float) -> tuple[Server, ...]:
        """The engines that are up, after a sure look at each; waits while none is.

        Raises:
            EngineUnavailable: the watch has given up an engine or the router.
            DeadlineExceeded: no engine is up after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                self._poll_engines(SURE_PROBE_WAIT_S)
                if self.failure is not None:
                    raise EngineUnavailable(self.failure)
                servers = tuple(engine.server for engine in self._engines if engine.url)
                if servers or not self._engines:
                    return servers
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"none of {len(self._engines)} engines came back within {timeout_s:.0f} s "
                    "(--startup-timeout-s); the logs are in the run folder under logs/"
                )
            time.sleep(BRING_UP_POLL_S)

    def take_metrics(self) -> dict[str, float]:
        """Restarts begun since the last call, and the slowest that ended; nothing when there were none."""
        with self._lock:
            counts = {f"rollout/{kind}_restarts": n for kind, n in self._num_restarts.items() if n}
            times, self._times = self._times, []
            self._num_restarts = dict.fromkeys(self._num_restarts, 0)
        metrics: dict[str, float] = {name: float(count) for name, count in counts.items()}
        return metrics | ({"perf/recovery_time": max(times)} if times else {})

    def _poll_engines(self, wait_s: float) -> None:
        for engine in self._engines:
            if engine.state is EngineState.STARTING:
                self._see_started(engine)
            elif engine.state is not EngineState.GIVEN_UP:
                if (reason := engine.host.death(wait_s)) is not None:
                    self._lose(engine, reason)
                elif engine.state is EngineState.SYNCED:
                    self._register(engine)

    def _see_started(self, engine: Engine) -> None:
        try:
            url = engine.host.started()
        except SlimeError as error:
            self._start(engine, f"it did not come up: {error}")
            return
        if url is not None:
            engine.url = url
            engine.state = EngineState.UNSYNCED if self._needs_weights else EngineState.SYNCED

    def _lose(self, engine: Engine, reason: str) -> None:
        then = (
            "starting it again"
            if engine.host.is_ours
            else "it is not ours to start, and serves again once it answers"
        )
        logger.warning("%s at %s is lost: %s; %s", engine.name, engine.url, reason, then)
        self._num_restarts["engine"] += 1
        engine.life += 1
        engine.lost_at = engine.lost_at or time.monotonic()
        url, engine.url = engine.url, ""
        try:
            self._router.remove_engine(url)
        except EngineUnavailable as error:
            logger.info("%s; if it is dead, its successor will not know the engine anyway", error)
        self._start(engine, reason)
        self._list_urls()

    def _start(self, engine: Engine, reason: str) -> None:
        if engine.starts.add():
            engine.state = EngineState.STARTING
            engine.host.begin_start()
        else:
            engine.state = EngineState.GIVEN_UP
            self._give_up(engine.name, engine.starts, reason)

    def _give_up(self, name: str, starts: Starts, reason: str) -> None:
        self.failure = (
            f"{name} was started again {len(starts.times) - 1} times in {STARTS_WINDOW_S / 60:.0f} "
            f"minutes and is dead again; at last: {reason}\nIts log is in the run folder under logs/."
        )
        logger.error("%s", self.failure)

    def _register(self, engine: Engine) -> None:
        """Make the router know a synced engine; what fails is tried again in the next poll."""
        try:
            self._router.add_engines([engine.url], REGISTER_TIMEOUT_S)
        except EngineUnavailable as error:
            logger.warning("%s is not registered yet: %s", engine.name, error)
            return
        engine.state = EngineState.SERVING
        engine.starts.bore_fruit()
        self._list_urls()
        if engine.lost_at is not None:
            self._note_recovery(engine.name, engine.url, engine.lost_at)
            engine.lost_at = None

    def _poll_router(self, hangs: str | None = None) -> None:
        if not self._router.is_dead and hangs is None:
            return
        reason = hangs or "its process has ended"
        logger.warning("the router %s is lost: %s; starting it again", self._router.url, reason)
        lost_at = time.monotonic()
        self._num_restarts["router"] += 1
        if not self._router_starts.add():
            self._give_up("the router", self._router_starts, reason)
            return
        try:
            self._router.restart(self._timeout_s)
        except EngineUnavailable as error:
            logger.warning("the router did not come up: %s", error)
            return
        try:
            self._router.add_engines(self.urls, REGISTER_TIMEOUT_S)
        except EngineUnavailable as error:
            logger.warning("the new router does not know all engines yet: %s", error)
            for engine in self._engines:
                if engine.state is EngineState.SERVING:
                    engine.state = EngineState.SYNCED
        self._router_starts.bore_fruit()
        self._note_recovery("the router", self._router.url, lost_at)

    def _poll_health(self) -> None:
        if self._health is None:
            return
        serving = [e for e in self._engines if e.state is EngineState.SERVING]
        checks = {engine.url + HEALTH_PATH: engine for engine in serving}
        router_check = self._router.url + ROUTER_HEALTH_PATH
        wanted = [*checks, router_check] if self._router.is_ours else list(checks)
        for check, reason in self._health.sweep(wanted if self._num_rounds else []).items():
            if check == router_check:
                self._poll_router(reason)
            else:
                self._lose(checks[check], reason)

    def _note_recovery(self, name: str, url: str, lost_at: float) -> None:
        seconds = time.monotonic() - lost_at
        self._times.append(seconds)
        logger.warning("%s serves again at %s, %.1f s after it was lost", name, url, seconds)

    def _list_urls(self) -> None:
        self.urls[:] = [e.url for e in self._engines if e.state is EngineState.SERVING]
