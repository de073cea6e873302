"""What a user reads when a run fails: the message, the few frames that matter, and where the rest is."""

import logging
import re
import traceback
from pathlib import Path

from slime.errors import SlimeError
from slime.observability.logging import HANDLER_NAME

_SHOWN_FRAMES = 4
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r'^ *File "(?P<file>[^"]+)", line \d+, in ')
# Frames of these say how the call came about, not what went wrong.
_MACHINERY = re.compile(r"/(ray|asyncio|concurrent|threading\.py|contextlib\.py)(/|$)")


def failure_text(error: BaseException) -> str:
    """The message for a run that ended with `error`.

    An error of slime's own is its message. Anything else is a bug in slime or in a function of the
    user: then the last frames stand here too, and `note_in_logs` keeps the whole traceback.
    """
    if isinstance(error, SlimeError):
        return f"{type(error).__name__}: {without_ray_noise(str(error))}"
    remote = getattr(error, "cause", None)
    if isinstance(remote, SlimeError):  # a RayTaskError around an error of ours
        return failure_text(remote)
    logs = log_files()
    where = f"in {logs[0]}" if logs else "above"
    if isinstance(remote, BaseException):
        shown = without_ray_noise(str(error))
    else:
        shown = f"{type(error).__name__}: {error}\n{last_frames(error)}".rstrip()
    return f"{shown}\nThis is a bug in slime or a plugin; the traceback is {where}"


def note_in_logs(error: BaseException) -> bool:
    """Write the traceback into this process's log files; whether there was one."""
    handlers = _file_handlers()
    record = logging.LogRecord(
        __name__, logging.ERROR, __file__, 0, "the run failed", None,
        (type(error), error, error.__traceback__),
    )  # fmt: skip
    for handler in handlers:
        handler.handle(record)
    return bool(handlers)


def log_files() -> list[Path]:
    """Log files of this process: the run folder's, once there is one."""
    return [Path(handler.baseFilename) for handler in _file_handlers()]


def last_frames(error: BaseException) -> str:
    """The last frames of the traceback, the innermost at the end."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without run_driver itself
    own = [frame for frame in frames if not _MACHINERY.search(frame.filename)]
    return "".join(traceback.format_list(own[-_SHOWN_FRAMES:]))


def without_ray_noise(text: str) -> str:
    """`text` without colours and without all but the last frames of a traceback from an actor."""
    lines = _COLOR.sub("", text).splitlines()
    starts = [i for i, line in enumerate(lines) if _FRAME.match(line)]
    ends = {start: _end_of_frame(lines, start) for start in starts}
    own = [i for i in starts if not _MACHINERY.search(_file_of(lines[i]))]
    dropped = {
        line
        for start in starts
        if start not in own[-_SHOWN_FRAMES:]
        for line in range(start, ends[start])
    }
    return "\n".join(line for i, line in enumerate(lines) if i not in dropped)


def _file_of(line: str) -> str:
    match = _FRAME.match(line)
    return match["file"] if match else ""


def _end_of_frame(lines: list[str], start: int) -> int:
    """The line after the frame: its source and markers are indented deeper than its first line."""
    indent = len(lines[start]) - len(lines[start].lstrip())
    end = start + 1
    while end < len(lines) and lines[end].startswith(" " * (indent + 2)):
        end += 1
    return end


def _file_handlers() -> list[logging.FileHandler]:
    return [
        handler
        for handler in logging.getLogger().handlers
        if handler.name == HANDLER_NAME and isinstance(handler, logging.FileHandler)
    ]
