"""EngineWatch: deaths, restarts and limits, with fake hosts and a fake router."""

from collections.abc import Sequence

import pytest

from slime.engines.health import HealthWatch
from slime.errors import DeadlineExceeded, EngineUnavailable
from slime.orchestration.engine_watch import (
    HEALTH_PATH,
    MAX_FRUITLESS_STARTS,
    ROUTER_HEALTH_PATH,
    Engine,
    EngineWatch,
    Server,
)


class FakeHost:
    """A host whose servers are up when the test says so."""

    is_ours = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_starts = 0
        self.is_up = False
        self.dead: str | None = None
        self.start_error: str | None = None

    def begin_start(self) -> None:
        self.num_starts += 1
        self.is_up, self.dead = False, None

    def started(self) -> str | None:
        if self.start_error:
            raise EngineUnavailable(self.start_error)
        return f"http://{self.name}/{self.num_starts}" if self.is_up else None

    def death(self, wait_s: float) -> str | None:
        return self.dead


class FakeRouter:
    """Knows engines; dead when the test says so."""

    url = "http://router"
    is_ours = True

    def __init__(self) -> None:
        self.engines: set[str] = set()
        self.is_dead = False
        self.is_deaf = False
        self.num_restarts = 0

    def restart(self, timeout_s: float) -> None:
        self.num_restarts += 1
        self.is_dead, self.engines = False, set()

    def add_engines(self, urls: Sequence[str], timeout_s: float) -> None:
        if self.is_dead or self.is_deaf:
            raise EngineUnavailable("no answer")
        self.engines |= set(urls)

    def remove_engine(self, url: str) -> None:
        if self.is_dead:
            raise EngineUnavailable("no answer")
        self.engines.discard(url)


class FakeHealth(HealthWatch):
    """Fails the checks in `failing`."""

    def __init__(self) -> None:
        self.failing: dict[str, str] = {}

    def sweep(self, urls: Sequence[str]) -> dict[str, str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {url: why for url, why in self.failing.items() if url in urls}


class World:
    """Two engines that serve, and their watch."""

    def __init__(self, *, needs_weights: bool = True) -> None:
        self.hosts = [FakeHost("a"), FakeHost("b")]
        self.router = FakeRouter()
        self.health = FakeHealth()
        self.watch = EngineWatch(
            [Engine(f"engine {host.name}", host) for host in self.hosts],
            self.router,
            needs_weights=needs_weights,
            health=self.health,
            timeout_s=1.0,
        )
        first = ["http://a/0", "http://b/0"]
        self.router.add_engines(first, 1.0)
        self.watch.all_serve(first)


def test_a_dead_engine_leaves_the_router_at_once_and_serves_again_only_with_weights():
    world = World()
    urls = world.watch.urls
    world.hosts[0].dead = "its process ended with signal SIGKILL"
    world.watch.poll()
    assert urls == ["http://b/0"]
    assert world.router.engines == {"http://b/0"}
    assert world.watch.waiting == ()
    world.hosts[0].is_up = True
    world.watch.poll()
    assert world.watch.waiting == (Server("http://a/1", 1),)
    assert world.router.engines == {"http://b/0"}
    world.watch.admit([Server("http://a/1", 1)])
    assert world.router.engines == {"http://b/0", "http://a/1"}
    assert urls == ["http://a/1", "http://b/0"]  # the list that args.engine_urls is
    metrics = world.watch.take_metrics()
    assert metrics.pop("perf/recovery_time") >= 0
    assert metrics == {"rollout/engine_restarts": 1.0}
    assert world.watch.take_metrics() == {}


def test_without_a_trainer_a_restarted_engine_serves_right_away():
    world = World(needs_weights=False)
    world.hosts[1].dead = "gone"
    world.watch.poll()
    world.hosts[1].is_up = True
    world.watch.poll()
    world.watch.poll()
    assert world.watch.urls == ["http://a/0", "http://b/1"]


def test_an_engine_that_dies_waiting_for_weights_is_started_once_more():
    world = World()
    world.hosts[0].dead = "gone"
    world.watch.poll()
    world.hosts[0].is_up = True
    world.watch.poll()
    world.hosts[0].dead = "gone again"
    world.watch.poll()
    assert world.watch.waiting == ()
    world.watch.admit([Server("http://a/1", 1)])  # late: its weights went to a dead server
    assert world.watch.urls == ["http://b/0"]
    assert world.hosts[0].num_starts == 2


def test_a_dead_router_comes_back_with_the_engines_that_serve():
    world = World()
    world.router.is_dead = True
    world.hosts[0].dead = "gone"
    world.watch.poll()
    assert world.router.num_restarts == 1
    assert world.router.engines == {"http://b/0"}
    assert world.watch.take_metrics()["rollout/router_restarts"] == 1.0


def test_engines_a_new_router_did_not_take_are_registered_later():
    world = World()
    world.router.is_dead = world.router.is_deaf = True
    world.watch.poll()
    assert world.watch.failure is None
    assert world.router.engines == set()
    world.router.is_deaf = False
    world.watch.poll()
    assert world.router.engines == {"http://a/0", "http://b/0"}
    assert len(world.watch.urls) == 2


def test_servers_that_hang_are_restarted_during_rounds_only():
    world = World()
    world.health.failing = {"http://a/0" + HEALTH_PATH: "no answer"}
    world.watch.poll()
    assert world.hosts[0].num_starts == 0
    world.watch.round_begins()
    world.watch.poll()
    world.watch.round_ends()
    assert world.hosts[0].num_starts == 1
    world.watch.round_begins()
    world.health.failing = {"http://router" + ROUTER_HEALTH_PATH: "no answer"}
    world.watch.poll()
    assert world.router.num_restarts == 1


def test_bring_up_names_the_engines_that_are_up_and_waits_while_none_is():
    world = World()
    world.hosts[0].dead = "gone"
    assert world.watch.bring_up(0.0) == (Server("http://b/0", 0),)
    world.hosts[1].dead = "gone"
    with pytest.raises(DeadlineExceeded, match="none of 2 engines"):
        world.watch.bring_up(0.0)
    world.hosts[0].is_up = True
    assert world.watch.bring_up(0.0) == (Server("http://a/1", 1),)


def test_an_engine_that_never_comes_up_is_given_up_with_the_reason():
    world = World()
    world.hosts[0].dead = "gone"
    world.hosts[0].start_error = "The end of its log: no such model"
    for _ in range(MAX_FRUITLESS_STARTS + 1):
        world.watch.poll()
    assert world.hosts[0].num_starts == MAX_FRUITLESS_STARTS
    assert world.watch.failure is not None
    assert "no such model" in world.watch.failure
    with pytest.raises(
        EngineUnavailable, match=r"engine a was started again 5 times(.|\n)*no such"
    ):
        world.watch.bring_up(0.0)
