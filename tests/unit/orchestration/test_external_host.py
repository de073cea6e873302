"""An engine that somebody else runs, through its lives; the server is a fake that answers four requests."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from slime.engines.external import Wanted
from slime.engines.ports import hold_port
from slime.errors import ConfigError, EngineUnavailable
from slime.orchestration.external_host import ExternalHost

WANTED = Wanted(
    kind="embedded",
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    checkpoint="/models/qwen3",
    gets_weights=True,
    run="f00d",
)


class FakeServer:
    """A server at a port of its own that can end and begin anew there."""

    def __init__(self) -> None:
        self.port = hold_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model_type = "qwen3"
        self.version = "default"
        self._http: ThreadingHTTPServer | None = None

    def begin(self) -> None:
        """With the weights of its folder."""
        fake = self
        self.version = "default"

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                model = {"model_type": fake.model_type, "architectures": ["Qwen3ForCausalLM"]}
                self._send(model | {"slime_engine": "embedded", "weight_version": fake.version})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/update_weight_version"
                fake.version = body["new_version"]
                self._send({"success": True})

            def _send(self, content: dict[str, Any]) -> None:
                data = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def end(self) -> None:
        assert self._http is not None
        self._http.shutdown()
        self._http.server_close()


def until(condition: Callable[[], Any]) -> Any:
    """What the condition says once it is something."""
    deadline = time.monotonic() + 20.0
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_server_counts_again_once_it_is_back_and_fits() -> None:
    server = FakeServer()
    host = ExternalHost(server.url, WANTED)
    with pytest.raises(
        EngineUnavailable, match=rf"{server.url} could not be adopted.*--sglang-api-"
    ):
        host.first_url(0.0)
    server.begin()
    assert host.first_url(5.0) == server.url
    assert server.version == "adopted-by-f00d"
    assert host.death(5.0) is None
    server.version = "3"  # the trainer's weights
    assert host.death(5.0) is None

    server.end()
    assert "nobody answers there" in until(lambda: host.death(1.0))
    host.begin_start()
    assert host.started() is None
    server.model_type = "llama"
    server.begin()
    time.sleep(1.5)  # it was asked, and is another
    assert host.started() is None
    server.model_type = "qwen3"
    assert until(host.started) == server.url
    assert server.version == "adopted-by-f00d"
    host.stop()
    server.end()


def test_a_server_that_was_started_again_between_two_looks_is_noticed() -> None:
    server = FakeServer()
    server.begin()
    host = ExternalHost(server.url, WANTED)
    host.first_url(5.0)
    server.version = "3"
    assert host.death(5.0) is None
    server.end()
    server.begin()
    reason = until(lambda: host.death(1.0))
    assert "version 'default', which this run did not give" in reason
    host.stop()
    server.end()


def test_a_server_that_does_not_fit_ends_the_start_at_once() -> None:
    server = FakeServer()
    server.model_type = "llama"
    server.begin()
    host = ExternalHost(server.url, WANTED)
    with pytest.raises(ConfigError, match=r"--rollout-external-engine-addrs: http.* serves llama"):
        host.first_url(60.0)
    assert server.version == "default"  # it was left as it was
    host.stop()
    server.end()
