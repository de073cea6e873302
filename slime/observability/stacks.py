"""Stacks of a process as text, and what they tell: where a thread is, whether in a collective."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from slime.observability.loop_watch import is_users

_PY_SPY_TIMEOUT_S = 15.0
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'^  File "([^"]+)", line (\d+) in (.+)$')
_PY_SPY_THREAD = re.compile(r"^Thread (\d+) ")
_PY_SPY_FRAME = re.compile(r"^    (.+) \((.+):(\d+)\)$")
# Where a rank stands while it waits for the others: torch's own Python, and what calls it.
_COLLECTIVE_FILES = ("/torch/distributed/",)
_OURS = "/slime/"
_BACKGROUND = ("/slime/observability/", "/site-packages/ray/")


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function}() at {_short(self.file)}:{self.line}"


def parse_stacks(text: str) -> dict[int, list[Frame]]:
    """Stack of each thread, innermost frame first, from faulthandler's text or py-spy's.

    The key is the thread's `ident` in faulthandler's, its number in the system in py-spy's.
    """
    threads: dict[int, list[Frame]] = {}
    frames: list[Frame] = []
    for line in text.splitlines():
        if found := _THREAD.match(line):
            frames = threads.setdefault(int(found[1], 16), [])
        elif found := _FRAME.match(line):
            frames.append(Frame(found[1], int(found[2]), found[3]))
        elif found := _PY_SPY_THREAD.match(line):
            frames = threads.setdefault(int(found[1]), [])
        elif found := _PY_SPY_FRAME.match(line):
            frames.append(Frame(found[2], int(found[3]), found[1]))
    return threads


def telling_frame(threads: dict[int, list[Frame]], main_thread: int) -> Frame | None:
    """The frame that says most about what a process does.

    The main thread's innermost frame in the user's code or slime's; another thread's, when the main
    thread has none; None when no thread has any, as in an actor that waits for calls.
    """
    main = threads.get(main_thread, [])
    for frames in (main, *threads.values()):
        for frame in frames:
            if any(part in frame.file for part in _BACKGROUND):
                break
            if is_users(frame.file) or _OURS in frame.file:
                return frame
    return None


def collective_frame(threads: dict[int, list[Frame]]) -> Frame | None:
    """The call inside torch.distributed that a thread is in; None when there is none."""
    for frames in threads.values():
        inside = [frame for frame in frames if any(p in frame.file for p in _COLLECTIVE_FILES)]
        if inside:
            return inside[0]
    return None


def foreign_stacks(pid: int) -> tuple[str, str]:
    """(stacks by py-spy, "") of a process that is not slime's own, or ("", why there are none)."""
    tool = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    if not Path(tool).exists():
        return "", "not slime's own process, and py-spy is not installed"
    try:
        done = subprocess.run(
            [tool, "dump", "--full-filenames", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=_PY_SPY_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return "", f"py-spy gave no stacks within {_PY_SPY_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return done.stdout, ""
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
    return "", f"not slime's own process; py-spy: {reason}"


def _short(file: str) -> str:
    """The last three parts of a path: enough to find the file."""
    parts = Path(file).parts
    return file if len(parts) <= 4 else "/".join(("...", *parts[-3:]))
