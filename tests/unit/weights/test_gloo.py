"""What the gloo transport does about engines that are not there."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from slime.engines.control import EngineControl
from slime.errors import EngineUnavailable
from slime.weights.gloo import GlooTransport


class FakeEngine(BaseHTTPRequestHandler):
    """Is healthy, and never answers the call to join a group."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        time.sleep(5.0)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def fake_engine() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), FakeEngine)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_dead_engine_is_named_before_the_others_wait_for_it(fake_engine: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}"
    control = EngineControl((fake_engine, dead), timeout_s=60.0)
    transport = GlooTransport(control, host="127.0.0.1", timeout_s=60.0)
    started = time.monotonic()
    with pytest.raises(EngineUnavailable, match=dead):
        transport.open()
    assert time.monotonic() - started < 4.0
    control.close()
