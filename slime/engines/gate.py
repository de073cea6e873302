"""The gate that requests to engines pass; while weights come in the middle of answers it is closed.

SGLang's pause ends the requests it has and then looks once a second whether all have ended. One that comes
in the meantime, the rest of an answer that was just cut short, say, costs every engine that second.
"""

import asyncio
import math
import threading
from asyncio import AbstractEventLoop, Future
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from time import monotonic


class Gate:
    """Holds requests back and counts those under way, on all event loops of this process; thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_closed = False
        self._opened_at = -math.inf
        self._num_under_way = 0
        self._waiting: list[tuple[AbstractEventLoop, Future[None]]] = []

    def close(self) -> None:
        """From now on requests wait."""
        with self._changed:
            self._is_closed = True

    def open(self) -> None:
        """Let those that wait go, first come, first served."""
        with self._changed:
            if not self._is_closed:
                return
            self._is_closed, self._opened_at = False, monotonic()
            waiting, self._waiting = self._waiting, []
        for loop, future in waiting:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_let_go, future)

    def wait_none(self, timeout_s: float) -> bool:
        """Whether no request is under way, after at most `timeout_s` seconds; blocks."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_under_way == 0, timeout_s)

    @asynccontextmanager
    async def request(self) -> AsyncGenerator[None]:
        """One request, from its passing of the gate to its answer."""
        while not self._enter():
            await self._opened()
        try:
            yield
        finally:
            with self._changed:
                self._num_under_way -= 1
                self._changed.notify_all()

    async def opened_within(self, seconds: float) -> bool:
        """Whether it opened in the last `seconds`; waits while it is closed."""
        while self._is_closed:
            await self._opened()
        return monotonic() - self._opened_at < seconds

    def _enter(self) -> bool:
        with self._changed:
            self._num_under_way += not self._is_closed
            return not self._is_closed

    async def _opened(self) -> None:
        loop = asyncio.get_running_loop()
        future: Future[None] = loop.create_future()
        with self._changed:
            if not self._is_closed:
                return
            self._waiting.append((loop, future))
        await future


def _let_go(future: "Future[None]") -> None:
    if not future.done():
        future.set_result(None)


# Of all requests that this process sends to the run's engines.
gate = Gate()
