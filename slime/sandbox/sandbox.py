"""Sandbox: runs Python that a model wrote, many programs at a time, from any event loop.

    sandbox = Sandbox()
    result = await sandbox.run("print(sum(map(int, input().split())))", stdin="1 2")

A program computes, reads its standard input and writes its output, no more: it opens no file, reaches
no network, starts no process, and sees nothing of this process or of other programs. It may import
the standard library and `packages`.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from slime.errors import ConfigError, DeadlineExceeded, SandboxError
from slime.observability.waits import waiting
from slime.sandbox.programs import Files, Outcome, Program, Result

logger = logging.getLogger(__name__)

MAX_PROGRAMS = 64
_START_TIMEOUT_S = 120.0
_MAX_MESSAGE = 1 << 16
_SERVER = Path(__file__).with_name("server.py")
# Nothing of this process's environment: it holds keys.
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # a program prints a set in the same order each time
    "MALLOC_ARENA_MAX": "1",  # arenas of threads would use up the address space
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(eq=False)
class _Job:
    """Programs that start together: one, or a pair with a socket in between."""

    programs: Sequence[Program]
    cpu_s: int
    wall_s: float
    done: "Future[list[Result]]" = field(default_factory=Future["list[Result]"])
    has_slot: bool = False
    files: dict[int, Files] = field(default_factory=dict[int, Files])
    order: list[int] = field(default_factory=list[int])
    results: dict[int, Result] = field(default_factory=dict[int, Result])


class Sandbox:
    """Starts with the first program; `close` ends it with all that run.

    Args:
        max_programs: at a time, a pair counting as one; the others wait for their turn. None: one for
            each processor this process may use.
        memory_bytes: of each program.
        output_bytes: of its standard output, and of its standard error.
        packages: importable besides the standard library; loaded once.

    Attributes:
        layers: of protection that are in force, once it has started.
    """

    def __init__(
        self,
        *,
        max_programs: int | None = None,
        memory_bytes: int = 512 << 20,
        output_bytes: int = 256 << 10,
        packages: Sequence[str] = (),
    ) -> None:
        wanted = max_programs or len(os.sched_getaffinity(0))
        self._max_programs = min(wanted, MAX_PROGRAMS)
        self._memory_bytes = memory_bytes
        self._output_bytes = output_bytes
        self._packages = tuple(packages)
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._queue: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._num_running = 0
        self._link: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        self.layers: tuple[str, ...] = ()

    async def run(
        self, code: str, *, stdin: str = "", cpu_s: int = 5, wall_s: float = 20.0
    ) -> Result:
        """What a program did.

        Cancelling ends the program. Its seconds count from its start, not while it waits for its turn.

        Args:
            cpu_s: processor seconds.
            wall_s: seconds on the clock: larger than `cpu_s`, as a busy machine makes programs wait.

        Raises:
            ConfigError: this machine cannot run programs safely, or lacks one of the packages.
            SandboxError: the sandbox itself died; the next program gets a new one.
        """
        return (await self._do([Program(code=code, stdin=stdin)], cpu_s, wall_s))[0]

    async def test(
        self, code: str, tests: str, *, cpu_s: int = 5, wall_s: float = 20.0
    ) -> tuple[bool, Result, Result]:
        """Whether `tests`, Python with assert statements about the names of `code`, get to their end.

        They run in a process of their own; only plain data cross, see calls.py.

        Returns:
            (passed, what the tests did, what the code did).

        Raises: as `run`.
        """
        pair = [Program(code=tests, kind="test"), Program(code=code, kind="serve")]
        result, served = await self._do(pair, cpu_s, wall_s)
        return result.outcome is Outcome.OK, result, served

    async def _do(self, programs: Sequence[Program], cpu_s: int, wall_s: float) -> list[Result]:
        if self._link is None:
            await asyncio.to_thread(self.start)
        job = _Job(programs, cpu_s, wall_s)
        self._submit(job)
        try:
            with waiting("the sandbox", "run a program", warn_after_s=3 * wall_s):
                return await asyncio.wrap_future(job.done)
        except asyncio.CancelledError:
            self._cancel(job)
            raise

    def start(self) -> Self:
        """Start the template now, and say what protects this machine.

        Raises: as `run`.
        """
        with self._starting:
            if self._link is None:
                self._start()
        return self

    def _start(self) -> None:
        if sys.platform != "linux":
            raise ConfigError(_refusal(f"it needs Linux, and this is {sys.platform}"))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-s", str(_SERVER), str(theirs.fileno()), *self._packages],
                env=_ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            ready = _first_message(ours)
            if ready["op"] == "refused":
                raise ConfigError(_refusal(ready["why"]))
            if ready["missing"]:
                raise ConfigError(f"packages of the sandbox: no {', '.join(ready['missing'])}")
        except BaseException:
            ours.close()
            process.kill()
            process.wait()
            raise
        self.layers = tuple(ready["layers"])
        logger.info("sandbox: %s", ", ".join(self.layers))
        with self._lock:
            self._link, self._process = ours, process
        threading.Thread(target=self._listen, args=(ours, process), daemon=True).start()

    def _submit(self, job: _Job) -> None:
        with self._lock:
            if self._link is None:  # it died between the start and now
                self._finish(job, SandboxError("the sandbox died before it took the program"))
                return
            self._queue.append(job)
            self._send_next()

    def _send_next(self) -> None:
        """Send what has its turn; the lock is held."""
        while self._link and self._queue and self._num_running < self._max_programs:
            job = self._queue.popleft()
            if job.done.done():
                continue
            self._num_running += 1
            job.has_slot = True
            try:
                self._send(self._link, job)
            except OSError as error:
                self._finish(job, SandboxError(f"the sandbox takes no programs: {error}"))

    def _send(self, link: socket.socket, job: _Job) -> None:
        is_pair = len(job.programs) == 2
        peers = socket.socketpair() if is_pair else ()
        try:
            for position, program in enumerate(job.programs):
                number = next(self._numbers)
                job.order.append(number)
                job.files[number] = Files(program)
                self._running[number] = job
                order = {
                    "op": "start",
                    "id": number,
                    "cpu_s": job.cpu_s,
                    "wall_s": job.wall_s,
                    "memory_bytes": self._memory_bytes,
                    "output_bytes": self._output_bytes,
                }
                peer = [peers[position].fileno()] if is_pair else []
                descriptors = [*job.files[number].descriptors, *peer]
                socket.send_fds(link, [json.dumps(order).encode()], descriptors)
        finally:
            for peer in peers:
                peer.close()

    def _cancel(self, job: _Job) -> None:
        with self._lock:
            for number in job.order:
                if number in self._running and self._link:
                    with contextlib.suppress(OSError):  # gone, and its programs with it
                        self._link.send(json.dumps({"op": "kill", "id": number}).encode())

    def _listen(self, link: socket.socket, process: "subprocess.Popen[bytes]") -> None:
        """Take results until the template is gone."""
        try:
            while message := link.recv(_MAX_MESSAGE):
                self._take(json.loads(message))
        except ConnectionError:
            pass
        except Exception:
            logger.exception("sandbox: a result that cannot be taken ends this template")
        finally:
            self._lose(link)
            link.close()
            process.wait()

    def _lose(self, link: socket.socket) -> None:
        """Fail all that runs and waits, unless a new template has taken over."""
        with self._lock:
            if self._link is not link:
                return
            self._link = None
            error = SandboxError("the sandbox died while the program ran; the next gets a new one")
            for job in {*self._running.values(), *self._queue}:
                self._finish(job, error)
            self._queue.clear()

    def _take(self, end: dict[str, Any]) -> None:
        with self._lock:
            job = self._running.pop(end["id"], None)
            if job is None:
                return  # it was told to be lost before
            files = job.files[end["id"]]
            limits = {"cpu_s": job.cpu_s, "output_bytes": self._output_bytes}
            job.results[end["id"]] = files.result(end, **limits)
            if len(job.results) == len(job.programs):
                self._finish(job, None)
                self._send_next()

    def _finish(self, job: _Job, error: Exception | None) -> None:
        """Close a job's files and tell its caller; the lock is held."""
        if job.has_slot:
            self._num_running -= 1
        for number, files in job.files.items():
            self._running.pop(number, None)
            files.close()
        if not job.done.set_running_or_notify_cancel():
            return  # nobody waits any more
        if error is None:
            job.done.set_result([job.results[number] for number in job.order])
        else:
            job.done.set_exception(error)

    def close(self) -> None:
        """End all programs; those who wait for them get a SandboxError."""
        with self._lock:
            link, process = self._link, self._process
            if link is None or process is None:
                return
            with contextlib.suppress(OSError):  # the template may be gone
                link.shutdown(socket.SHUT_RDWR)
            self._lose(link)
        process.wait()


def _first_message(link: socket.socket) -> dict[str, Any]:
    link.settimeout(_START_TIMEOUT_S)
    try:
        message = link.recv(_MAX_MESSAGE)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"the sandbox did not start within {_START_TIMEOUT_S:g} s; is the machine overloaded?"
        ) from error
    if not message:
        raise SandboxError("the sandbox died at its start; what it said stands above")
    link.settimeout(None)
    return json.loads(message)


def _refusal(why: str) -> str:
    return (
        f"this machine cannot run a model's programs safely: {why}. The sandbox needs Linux on x86_64 or "
        "aarch64 whose kernel takes seccomp filters (containers: not with a profile that forbids prctl); "
        "run the rollout there, or take a reward without programs"
    )
