"""Notices that an event loop no longer turns, and names the function that blocks it."""

import asyncio
import sys
import sysconfig
from types import FrameType

from slime.observability.waits import WaitRow, add_check, remove_check

BLOCKED_AFTER_S = 10.0

_NOT_THE_USERS = tuple(
    {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_OURS = __file__.rpartition("/observability/")[0] + "/"


class LoopWatch:
    """Watches one loop until `stop`; the watch of `waits` asks it about each second.

    Args:
        loop: the event loop.
        thread_id: `ident` of the thread it runs on.
        blocked_after_s: a loop that has not turned for so long is told of.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        thread_id: int,
        *,
        blocked_after_s: float = BLOCKED_AFTER_S,
    ) -> None:
        self._loop = loop
        self._thread_id = thread_id
        self._blocked_after_s = blocked_after_s
        self._asked: float | None = None
        add_check(self.check)

    def check(self, now: float) -> WaitRow | None:
        """A row when the loop has not answered for too long; asks it to answer again otherwise."""
        if self._asked is None:
            self._asked = now
            try:
                self._loop.call_soon_threadsafe(self._answer)
            except RuntimeError:  # closed meanwhile
                self.stop()
            return None
        blocked_s = now - self._asked
        if blocked_s < self._blocked_after_s:
            return None
        culprit = blamed_function(self._thread_id)
        return WaitRow(
            on=culprit,
            what="block the event loop",
            waited_s=round(blocked_s, 3),
            late=True,
            sentence=f"the event loop has been blocked for {blocked_s:.0f} s by {culprit}: nothing "
            "else runs meanwhile. Await there, or make it a plain function, which gets a thread.",
        )

    def stop(self) -> None:
        """Watch no more."""
        remove_check(self.check)

    def _answer(self) -> None:
        self._asked = None


def blamed_function(thread_id: int) -> str:
    """`reward() at /home/me/rewards.py:12`: the innermost function of the user's on that thread.

    Without one, the innermost that is not asyncio's.
    """
    frame = sys._current_frames().get(thread_id)  # pyright: ignore[reportPrivateUsage]
    stack: list[FrameType] = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    chosen = (
        next((item for item in stack if is_users(item.f_code.co_filename)), None)
        or next((item for item in stack if "/asyncio/" not in item.f_code.co_filename), None)
        or next(iter(stack), None)
    )
    if chosen is None:
        return "an ended thread"
    code = chosen.f_code
    return f"{code.co_name}() at {code.co_filename}:{chosen.f_lineno}"


def is_users(filename: str) -> bool:
    """Whether code of this file is neither Python's, nor an installed package's, nor slime's."""
    is_installed = "/site-packages/" in filename or "/dist-packages/" in filename
    return not is_installed and not filename.startswith((*_NOT_THE_USERS, _OURS, "<"))
