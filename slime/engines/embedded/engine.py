"""EngineLoop: the thread that owns model, cache and scheduler; everybody else hands it work."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial

from slime.engines.embedded.requests import Request, RequestGroup
from slime.engines.embedded.scheduler import Scheduler
from slime.engines.protocol import finish_abort
from slime.errors import EngineUnavailable

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 2.0

# Hands over, once per step: groups that are complete, and streaming requests that got a token.
Deliver = Callable[[list[RequestGroup], list[Request]], None]


class EngineLoop:
    """Runs a scheduler in a thread of its own.

    Args:
        scheduler: nobody else may touch it afterwards; `call` runs code on its thread.
        deliver: called on the engine thread; must return at once.
        on_failure: called there after the last delivery when the loop ended by an error.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        deliver: Deliver,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._deliver = deliver
        self._on_failure = on_failure
        self._inbox: deque[Callable[[], None]] = deque()
        self._open: set[Request] = set()
        self._wake = threading.Event()
        self._is_stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its present step; waiting requests end as aborted."""
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT_S)

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    @property
    def failure(self) -> BaseException | None:
        """What ended the loop, if it ended by itself."""
        return self._failure

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests; their group is delivered once all of them have ended."""
        self._post(partial(self._add_all, tuple(requests)))

    def call[T](self, work: Callable[[Scheduler], T]) -> "Future[T]":
        """The result of `work(scheduler)`, run on the engine thread between two steps.

        The future raises what `work` raises, or EngineUnavailable when the loop has ended.
        """
        future: Future[T] = Future()
        self._post(partial(self._settle, future, work))
        return future

    def _post(self, work: Callable[[], None]) -> None:
        if self._is_stopping or self._failure is not None:
            raise EngineUnavailable(f"the engine has stopped: {self._failure or 'shutting down'}")
        self._inbox.append(work)
        self._wake.set()

    def _add_all(self, requests: tuple[Request, ...]) -> None:
        self._open.update(requests)
        for request in requests:
            self._scheduler.add(request)

    def _settle[T](self, future: "Future[T]", work: Callable[[Scheduler], T]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work(self._scheduler))
        except Exception as error:  # noqa: BLE001  # forwarded to the caller, who logs it
            future.set_exception(error)

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._wake.clear()
                while self._inbox:
                    self._inbox.popleft()()
                if self._scheduler.has_work:
                    self._scheduler.step()
                    self._hand_over()
                else:
                    self._hand_over()
                    self._wait()
        except BaseException as error:
            self._failure = error
            logger.exception("the engine loop failed; every later request is refused")
            raise
        finally:
            self._close()

    def _wait(self) -> None:
        if not self._inbox and not self._is_stopping:
            self._wake.wait()

    def _hand_over(self) -> None:
        """Deliver what ended or advanced since the last call."""
        scheduler = self._scheduler
        if not scheduler.finished and not scheduler.progress:
            return
        finished, scheduler.finished = scheduler.finished, []
        progress, scheduler.progress = scheduler.progress, []
        complete: list[RequestGroup] = []
        self._open.difference_update(finished)
        for request in finished:
            group = request.group
            if request.stream:
                progress.append(request)
            if group is not None:
                group.pending -= 1
                if not group.pending:
                    complete.append(group)
        self._deliver(complete, progress)

    def _close(self) -> None:
        """End all requests and refuse calls that came too late to run."""
        reason = f"the engine has stopped: {self._failure or 'shutting down'}"
        # Not the scheduler's own lists: a step that failed half-way may have a request in neither.
        for request in self._open.difference(self._scheduler.finished):
            request.finish = finish_abort(reason, 503)
            self._scheduler.finished.append(request)
        self._hand_over()
        while self._inbox:
            late = self._inbox.popleft()
            if isinstance(late, partial) and late.func == self._settle:
                late.args[0].set_exception(EngineUnavailable(reason))
        if self._failure is not None:
            self._on_failure()
