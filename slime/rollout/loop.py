"""The one event loop of this process, on its own thread, for callers that are not asynchronous."""

import asyncio
import atexit
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any

from slime.engines.client import close_clients
from slime.errors import DeadlineExceeded
from slime.observability.loop_watch import LoopWatch

SHUTDOWN_TIMEOUT_S = 5.0


class _LoopThread:
    """An event loop that runs on a daemon thread until `stop`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(
            target=self.loop.run_forever, name="slime-event-loop", daemon=True
        )
        self.thread.start()
        self.watch = LoopWatch(self.loop, self.thread.ident or 0)

    def stop(self) -> None:
        self.watch.stop()
        with suppress(TimeoutError, CancelledError):
            asyncio.run_coroutine_threadsafe(_finish(), self.loop).result(SHUTDOWN_TIMEOUT_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(SHUTDOWN_TIMEOUT_S)
        if not self.thread.is_alive():
            self.loop.close()


_lock = threading.Lock()
_running: _LoopThread | None = None


def run[T](coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
    """The coroutine's result; the calling thread waits while the process's event loop runs it.

    Args:
        timeout_s: cancel the coroutine after this many seconds; None leaves the deadline to it.

    Raises:
        DeadlineExceeded: `timeout_s` is over.
        RuntimeError: called on the event loop itself, where waiting would stop the loop.
    """
    worker = _loop_thread()
    if threading.current_thread() is worker.thread:
        name = coroutine.__qualname__
        coroutine.close()
        raise RuntimeError(f"run({name}) was called on the event loop; await the coroutine there")
    future = asyncio.run_coroutine_threadsafe(coroutine, worker.loop)
    try:
        return future.result(timeout_s)
    except TimeoutError:
        if future.done():  # the coroutine itself raised a TimeoutError
            raise
        future.cancel()
        raise DeadlineExceeded(
            f"{coroutine.__qualname__} did not finish within {timeout_s} s and was cancelled"
        ) from None
    except BaseException:
        future.cancel()  # Ctrl-C in the waiting thread must not leave the work running
        raise


async def gather[T](coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order. When one raises, the others are cancelled and awaited before it goes on.

    Each has a task of its own and begins at once: one that waits for nothing ends without a turn of
    the loop, and so do all of them together.
    """
    running = asyncio.get_running_loop()
    tasks: list[asyncio.Task[T]] = []
    try:
        for coroutine in coroutines:
            tasks.append(asyncio.Task(coroutine, loop=running, eager_start=True))
        return await asyncio.gather(*tasks)
    except BaseException:
        await cancel(tasks)
        raise


async def cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel all tasks and return once they have ended; what they raise is dropped."""
    waiting = [task for task in tasks if not task.done()]
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


def shutdown() -> None:
    """End the loop thread and close its connections; the next `run` starts a new one."""
    global _running
    with _lock:
        worker, _running = _running, None
    if worker is not None:
        worker.stop()


def _loop_thread() -> _LoopThread:
    global _running
    with _lock:
        if _running is None:
            _running = _LoopThread()
        return _running


async def _finish() -> None:
    await cancel(asyncio.all_tasks() - {asyncio.current_task()})
    await close_clients()


atexit.register(shutdown)
