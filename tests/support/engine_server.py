"""Starts embedded engines and routers as real processes for tests."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slime.engines.servers import ServerProcess, ServerSpec, free_port

START_TIMEOUT_S = 240.0


def engine_spec(model_path: Path, log_dir: Path, *options: str) -> ServerSpec:
    """How to start an embedded engine on a free port."""
    port = free_port()
    command = [
        sys.executable, "-m", "slime.engines.embedded.server", "--model-path", str(model_path),
        "--port", str(port), *options,
    ]  # fmt: skip
    return ServerSpec(
        name=f"engine-{port}",
        command=tuple(command),
        url=f"http://127.0.0.1:{port}",
        health_path="/health",
        log_path=log_dir / f"engine-{port}.log",
        env={"OMP_NUM_THREADS": "1"},
    )


def router_spec(log_dir: Path, *options: str) -> ServerSpec:
    """How to start the real router on a free port."""
    port = free_port()
    command = [
        sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1", "--port", str(port),
        "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()),
        "--policy", "round_robin", "--log-level", "warn",
        "--shutdown-grace-period-secs", "0", *options,
    ]  # fmt: skip
    return ServerSpec(
        name="router",
        command=tuple(command),
        url=f"http://127.0.0.1:{port}",
        health_path="/liveness",
        log_path=log_dir / "router.log",
    )


@contextmanager
def running(spec: ServerSpec) -> Iterator[ServerProcess]:
    """The server, answering, while the block runs."""
    process = ServerProcess(spec)
    try:
        process.wait_healthy(START_TIMEOUT_S)
        yield process
    finally:
        process.stop()
