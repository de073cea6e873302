"""WorkerPool: processes that answer JSON lines, and are killed when an answer takes too long."""

import asyncio
import atexit
import contextlib
import functools
import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from slime.errors import DeadlineExceeded, RewardError

logger = logging.getLogger(__name__)


class _Worker:
    """One process; started on first use, and again after it was killed."""

    def __init__(self, command: Sequence[str], start_timeout_s: float) -> None:
        self._command = list(command)
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
        try:
            if self._process is None:
                self._start()
            stdin = cast(Any, self._process).stdin
            stdin.write(json.dumps(request).encode() + b"\n")
            return self._read(deadline_s)
        except (OSError, RewardError):  # a deadline is an OSError, as every TimeoutError is
            self.kill()
            raise

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        process.wait()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._read(self._start_timeout_s)  # {"ready": true}

    def _read(self, deadline_s: float) -> dict[str, Any]:
        process = cast("subprocess.Popen[bytes]", self._process)
        descriptor, line = cast(Any, process.stdout).fileno(), b""
        end = time.monotonic() + deadline_s
        while not line.endswith(b"\n"):
            remaining = end - time.monotonic()
            if remaining <= 0 or not _is_readable(descriptor, remaining):
                raise DeadlineExceeded(
                    f"worker {process.pid} gave no answer within {deadline_s:g} s"
                )
            if not (part := os.read(descriptor, 1 << 16)):
                raise RewardError(f"worker {process.pid} died with code {process.wait()}")
            line += part
        return json.loads(line)


def _is_readable(descriptor: int, seconds: float) -> bool:
    """Whether there is something to read within `seconds`; `select` takes no descriptor above 1,023."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


class WorkerPool:
    """A fixed number of processes of one command, asked from any event loop.

    Threads wait for the processes, so no request blocks the loop. A deadline counts from the moment
    a process gets the request, not while it queues: one slow request cannot fail those behind it.

    Args:
        command: prints one JSON line when ready, then one for each line it reads.
        num_workers: processes; each starts with its first request.
        start_timeout_s: seconds until it must be ready.
    """

    def __init__(
        self, command: Sequence[str], num_workers: int, *, start_timeout_s: float = 120.0
    ) -> None:
        self._workers = [_Worker(command, start_timeout_s) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="reward")
        self._closed = threading.Event()

    async def ask(self, request: Mapping[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """The answer of one process.

        Cancelling withdraws a request that still queues; one that runs ends at its deadline.

        Raises:
            DeadlineExceeded: no answer in time; the process was killed, the next request gets a new
                one.
            RewardError: the process died.
        """
        loop = asyncio.get_running_loop()
        call = functools.partial(self.ask_now, request, deadline_s=deadline_s)
        return await loop.run_in_executor(self._threads, call)

    def ask_now(self, request: Mapping[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """As `ask`, blocking this thread."""
        worker = self._idle.get()
        try:
            if self._closed.is_set():
                raise RewardError("the reward workers are closed")
            return worker.ask(request, deadline_s)
        except DeadlineExceeded:
            raise
        except OSError as error:
            raise RewardError(f"the reward worker is gone: {error}") from error
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Withdraw what queues, wait for what runs (at most its deadline), end the processes."""
        self._closed.set()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.kill()


_lock = threading.Lock()
_started: dict[str, WorkerPool] = {}


def script_pool(script: str, num_workers: int) -> WorkerPool:
    """This process's pool of a script in this folder; made on first use, closed at exit."""
    with _lock:
        if not _started:
            atexit.register(close_pools)
        if script not in _started:
            # -P: this folder must not come onto the worker's import path.
            command = [sys.executable, "-P", str(Path(__file__).with_name(script))]
            _started[script] = WorkerPool(command, max(num_workers, 1))
        return _started[script]


def close_pools() -> None:
    """End all worker processes; the next request starts new ones."""
    with _lock:
        while _started:
            _started.popitem()[1].close()
