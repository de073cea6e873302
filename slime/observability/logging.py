"""Log lines of one process: `12:03:44 INFO    train 0 | message`, on stderr and in a file."""

import logging
import re
import sys
from pathlib import Path
from typing import Any, Protocol, cast

# Libraries that report every request or every file at INFO.
_CHATTY = ("httpx", "httpcore", "urllib3", "filelock", "asyncio", "aiohttp.access", "matplotlib")
HANDLER_NAME = "slime"


class SupportsWrite(Protocol):
    """What a handler needs of its stream."""

    def write(self, text: str, /) -> int:
        """Take a line with its newline."""
        ...

    def flush(self) -> None:
        """Hold nothing back."""
        ...


def setup_logging(
    level: str | int = "INFO",
    role: str = "driver",
    *,
    folder: Path | None = None,
    console_level: str | int | None = None,
) -> None:
    """Set the root logger up for this process; calling it again replaces the first set-up.

    Args:
        level: least level shown, e.g. "INFO".
        role: who speaks, e.g. "driver", "train 0", "engine 1"; it stands before every message.
        folder: also write `{role}.log` there, with dates and logger names.
        console_level: least level on stderr, when it is to be higher than the file's.

    Raises:
        ValueError: `level` is no level name.
    """
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if handler.name == HANDLER_NAME]:
        root.removeHandler(old)
        old.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if console_level is not None:
        handlers[0].setLevel(console_level)
    formats = [_line_format(role, "%(asctime)s", "")]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / _file_name(role), encoding="utf-8"))
        formats.append(_line_format(role, "%(asctime)s.%(msecs)03d", "%(name)s: "))
    for handler, line_format, date_format in zip(
        handlers, formats, ("%H:%M:%S", "%Y-%m-%d %H:%M:%S"), strict=False
    ):
        handler.set_name(HANDLER_NAME)
        handler.setFormatter(logging.Formatter(line_format, date_format))
        root.addHandler(handler)
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def send_console_lines_to(stream: SupportsWrite | None) -> None:
    """Let lines for stderr go to `stream`, which has `write` and `flush`; None: to stderr again."""
    for handler in logging.getLogger().handlers:
        if handler.name == HANDLER_NAME and type(handler) is logging.StreamHandler:
            cast("logging.StreamHandler[Any]", handler).setStream(stream or sys.stderr)


def _line_format(role: str, time_part: str, name_part: str) -> str:
    # A role comes from us, but "%" in it would still break every line.
    escaped = role.replace("%", "%%")
    return f"{time_part} %(levelname)-7s {escaped} | {name_part}%(message)s"


def _file_name(role: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", role) + ".log"
