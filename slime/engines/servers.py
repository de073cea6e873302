"""One engine server as a child process: start it, wait until it answers, watch it, stop it."""

import contextlib
import ctypes
import logging
import os
import resource
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from slime.errors import EngineUnavailable
from slime.observability.doctor import child_environment, register_child

logger = logging.getLogger(__name__)

HEALTH_POLL_S = 0.1
STOP_GRACE_S = 5.0
LOG_TAIL_CHARS = 2000
OPEN_FILES = 65536

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
# Linux ends a child by PDEATHSIG when the *thread* that started it ends: so all are started by one
# thread that lives as long as this process.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawn-servers")


@dataclass(frozen=True, kw_only=True)
class ServerSpec:
    """How to start one server.

    Attributes:
        name: for messages and the log file, `engine-0` or `router`.
        command: argv of the process.
        url: address it will answer at.
        health_path: answers 200 once the server is ready.
        log_path: its stdout and stderr.
        env: variables added to this process's environment.
    """

    name: str
    command: tuple[str, ...]
    url: str
    health_path: str
    log_path: Path
    env: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class NodePart:
    """One node's share of an engine that lies on several.

    Attributes:
        rank: of the node within the engine; only 0 answers requests.
        count: nodes of the engine.
        meeting: host:port on node 0 where the parts find each other.
    """

    rank: int
    count: int
    meeting: str


class ServerProcess:
    """A running server; owns the child process and ends it, its children included, by process group."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._process = _spawner.submit(_spawn, spec).result()
        register_child(spec.name, self.pid, address=spec.url)

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def describe_end(self) -> str:
        """How the process ended: `exit code 1`, `signal SIGKILL`; or that it runs."""
        code = self._process.poll()
        if code is None:
            return "still running"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def wait_healthy(self, timeout_s: float) -> None:
        """Return once the server answers 200 at its health path.

        Raises:
            EngineUnavailable: the process ended, or did not answer within `timeout_s`; carries the
                log's end.
        """
        deadline = time.monotonic() + timeout_s
        with httpx.Client(timeout=5.0, trust_env=False) as http:
            while True:
                if not self.is_alive():
                    raise EngineUnavailable(
                        f"{self.spec.name} ended with {self.describe_end()} while starting. "
                        f"The end of {self.spec.log_path}:\n{self.log_tail()}"
                    )
                with contextlib.suppress(httpx.HTTPError):
                    if http.get(self.spec.url + self.spec.health_path).status_code == 200:
                        return
                if time.monotonic() > deadline:
                    raise EngineUnavailable(
                        f"{self.spec.name} at {self.spec.url} was not ready after {timeout_s:.0f} s "
                        f"(--startup-timeout-s). The end of {self.spec.log_path}:\n{self.log_tail()}"
                    )
                time.sleep(HEALTH_POLL_S)

    def log_tail(self) -> str:
        """The last lines the server wrote."""
        with contextlib.suppress(OSError):
            return self.spec.log_path.read_text(errors="replace")[-LOG_TAIL_CHARS:]
        return "(no log)"

    def stop(self) -> None:
        """End the server and its children: SIGTERM, and SIGKILL for what is left after a grace time."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_GRACE_S)
                return
        logger.warning("%s (pid %d) does not end; it is left", self.spec.name, self.pid)

    def kill(self) -> None:
        """End the server at once; also one that is stopped or hangs, which SIGTERM does not reach.

        Its children go too, even when it is dead itself: they would keep its device's memory.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_GRACE_S)

    def _signal(self, number: signal.Signals) -> None:
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def _spawn(spec: ServerSpec) -> "subprocess.Popen[bytes]":
    allow_open_files()
    with spec.log_path.open("ab") as log:
        return subprocess.Popen(
            spec.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **spec.env, **child_environment(spec.name)},
            # Its own session: a Ctrl-C in the terminal reaches the driver, which then stops
            # servers in order.
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def command_line(options: dict[str, Any]) -> list[str]:
    """Options as argv: `{"a_b": 1, "flag": True, "list": [1, 2]}` becomes `--a-b 1 --flag --list 1 2`."""
    argv: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            argv.append(flag)
        elif isinstance(value, list | tuple):
            argv += [flag, *map(str, value)]  # pyright: ignore[reportUnknownArgumentType]
        elif value is not None and value is not False:
            argv += [flag, str(value)]
    return argv


def allow_open_files() -> None:
    """Let this process, and those it starts, have as many connections as the system's hard limit.

    Each request in flight is a connection, two in the router, and the usual soft limit is 1024: at it
    a server accepts nothing more and says nothing.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent is gone: a killed actor must not leave a server behind."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
