"""HealthWatch against servers that answer, refuse and hang."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from slime.engines.health import HealthWatch

DEADLINE_S = 10.0


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(500 if self.path == "/broken" else 200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def hanging() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


@contextmanager
def watching(**options: float) -> Iterator[HealthWatch]:
    watch = HealthWatch(**{"interval_s": 0.01, "timeout_s": 1.0, **options})
    try:
        yield watch
    finally:
        watch.close()


def sweep_until(sweep: Callable[[], dict[str, str]], wanted: int) -> dict[str, str]:
    """All failures found until there are `wanted` of them."""
    found: dict[str, str] = {}
    give_up = time.monotonic() + DEADLINE_S
    while len(found) < wanted:
        assert time.monotonic() < give_up, found
        found |= sweep()
        time.sleep(0.005)
    return found


def test_hanging_and_broken_servers_are_found_and_healthy_ones_are_not(url: str, hanging: str):
    urls = [f"{url}/fine", f"{url}/broken", hanging]
    with watching() as watch:
        found = sweep_until(lambda: watch.sweep(urls), 2)
    assert set(found) == {f"{url}/broken", hanging}
    assert "status 500" in found[f"{url}/broken"]
    assert "no answer" in found[hanging]


def test_a_sweep_does_not_wait(hanging: str):
    with watching(timeout_s=5.0) as watch:
        begun = time.monotonic()
        assert watch.sweep([hanging]) == watch.sweep([hanging]) == {}
        assert time.monotonic() - begun < 1.0


def test_a_check_of_an_address_that_was_left_out_meanwhile_is_dropped(url: str):
    with watching(interval_s=100.0) as watch:
        assert watch.sweep([f"{url}/broken"]) == {}
        check = watch._running[f"{url}/broken"]
        assert check.verdict.result(DEADLINE_S) is not None
        assert watch.sweep([]) == {}
        assert watch.sweep([f"{url}/broken"]) == {}  # a new check begins


def test_the_first_check_waits(url: str):
    with watching(first_wait_s=100.0) as watch:
        watch.sweep([f"{url}/broken"])
        assert not watch._running
