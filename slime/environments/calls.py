"""Calls of an environment that may block or be asynchronous, from the event loop."""

import asyncio
import inspect
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from slime.errors import EpisodeError

Job = tuple[Callable[[], Any], asyncio.AbstractEventLoop, asyncio.Future[Any]]


class Caller:
    """Calls functions of one episode, one after the other.

    Those that are `async def` are awaited on the event loop. Plain ones run in a thread of the episode's own, as
    environments hold what belongs to one thread (a SQLite connection, an event loop). It is a daemon: one that
    hangs does not keep the process from ending.

    Args:
        name: of the environment; the thread has it too.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns.

        Raises:
            Whatever it raises; EpisodeError for what would end the event loop.
        """
        if inspect.iscoroutinefunction(function):
            return await function(*args)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._jobs,), name=self._name, daemon=True
            )
            self._thread.start()
        self._jobs.put((lambda: function(*args), loop, future))
        result = await future
        return await result if inspect.isawaitable(result) else result

    def end(self) -> None:
        """Let the thread end once it has done what it was told; returns at once."""
        self._jobs.put(None)


def _work(jobs: SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        function, loop, future = job
        result: Any = None
        failure: Exception | None = None
        try:
            result = function()
        except (SystemExit, StopIteration) as error:  # a future would not take them
            failure = EpisodeError(f"it raised {error!r}")
        except Exception as error:  # noqa: BLE001 - handed to the caller
            failure = error
        try:
            loop.call_soon_threadsafe(_settle, future, result, failure)
        except RuntimeError:  # the loop is closed, nobody waits any more
            return


def _settle(future: asyncio.Future[Any], result: Any, failure: Exception | None) -> None:
    if future.done():  # the caller gave up
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)
