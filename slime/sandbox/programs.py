"""What goes into the sandbox and what comes out: Program, Result, Outcome."""

import json
import os
import signal
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from slime.sandbox.runner import EXIT_MEMORY

_SLACK_S = 0.05  # the kernel counts processor time in ticks


class Outcome(StrEnum):
    """How a program ended."""

    OK = "ok"  # it got to its end, or left with exit code 0
    ERROR = "error"  # an exception, another exit code, a crash
    TIMEOUT = "timeout"  # of processor or wall seconds
    MEMORY = "memory"
    OUTPUT = "output"  # it wrote more than it may
    THREADS = "threads"


@dataclass(frozen=True, kw_only=True)
class Program:
    """Python to run.

    Attributes:
        code: its source.
        stdin: what it reads.
        kind: "script"; "serve" and "test" are the two halves of `Sandbox.test`.
    """

    code: str
    stdin: str = ""
    kind: Literal["script", "serve", "test"] = "script"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a program did.

    Attributes:
        stdout, stderr: what it wrote, up to the limit; bytes that are no UTF-8 are replaced.
        outcome: how it ended.
        exit_code: negative: the signal that ended it.
        seconds: from its start to its end, on the clock.
        cpu_s: processor seconds.
    """

    stdout: str
    stderr: str
    outcome: Outcome
    exit_code: int
    seconds: float
    cpu_s: float


class Files:
    """The files of one program, in memory: request, stdin, stdout, stderr."""

    def __init__(self, program: Program) -> None:
        request = json.dumps({"kind": program.kind, "code": program.code}).encode()
        # Of a lone surrogate, which is no text, only the program would see the difference.
        contents = [request, program.stdin.encode("utf-8", "replace"), b"", b""]
        self.descriptors: list[int] = []
        for content in contents:
            descriptor = os.memfd_create("sandbox")
            self.descriptors.append(descriptor)
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.lseek(descriptor, 0, os.SEEK_SET)

    def result(self, end: dict[str, Any], *, cpu_s: int, output_bytes: int) -> Result:
        """The result, from what the template tells about the end."""
        texts = [os.pread(descriptor, output_bytes, 0) for descriptor in self.descriptors[2:]]
        exit_code = os.waitstatus_to_exitcode(end["status"])
        is_full = any(len(text) >= output_bytes for text in texts)
        return Result(
            stdout=texts[0].decode("utf-8", "replace"),
            stderr=texts[1].decode("utf-8", "replace"),
            outcome=_outcome(exit_code, end, is_full=is_full, cpu_s=cpu_s),
            exit_code=exit_code,
            seconds=end["wall_s"],
            cpu_s=end["cpu_s"],
        )

    def close(self) -> None:
        """Forget them."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def _outcome(exit_code: int, end: dict[str, Any], *, is_full: bool, cpu_s: int) -> Outcome:
    if end["why"] == "threads":
        return Outcome.THREADS
    if end["why"] == "wall" or exit_code == -signal.SIGXCPU:
        return Outcome.TIMEOUT
    if (
        exit_code == -signal.SIGKILL
    ):  # by the processor limit's second half, or by a kernel short of memory
        return Outcome.TIMEOUT if end["cpu_s"] + _SLACK_S >= cpu_s else Outcome.MEMORY
    if is_full:
        return Outcome.OUTPUT
    if exit_code == EXIT_MEMORY:
        return Outcome.MEMORY
    return Outcome.OK if exit_code == 0 else Outcome.ERROR
