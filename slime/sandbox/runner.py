"""What a locked process runs: a program, the code under test, or the tests."""

import atexit
import contextlib
import io
import linecache
import os
import sys
import threading
import traceback
import types
from typing import Any

from slime.sandbox.calls import Tester, serve

EXIT_ERROR, EXIT_MEMORY = 1, 97
PEER = 3  # descriptor of the socket to the other process of a pair
_NAME = "<program>"


def prepare() -> None:
    """What has to be done while files still open: streams on the descriptors 0 to 2."""
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8", "replace")
    out = io.BufferedWriter(io.FileIO(1, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(out, "utf-8", "backslashreplace")
    error = io.BufferedWriter(io.FileIO(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(error, "utf-8", "backslashreplace", line_buffering=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sizes = {descriptor: os.fstat(descriptor) for descriptor in range(3)}

    # The C library asks by a call that could be given a path as well, so that one is closed.
    def fstat(fd: int) -> os.stat_result:
        """Of the three standard streams, as they were at the start."""
        if fd not in sizes:
            raise PermissionError(1, "fstat is closed here")
        return sizes[fd]

    os.fstat = fstat


def run(kind: str, code: str) -> int:
    """The exit code of the program; 0 if it got to its end.

    Args:
        kind: "script"; "serve": then answer calls of the tests; "test": with the names of the code.
    """
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = [_NAME]
    linecache.cache[_NAME] = (len(code), None, code.splitlines(keepends=True), _NAME)
    status = EXIT_ERROR
    try:
        _execute(kind, code, vars(module))
        status = 0
    except SystemExit as leaving:
        status = _exit_code(leaving)
    except BaseException as error:  # noqa: BLE001 - this is where a program's errors end
        status = EXIT_MEMORY if isinstance(error, MemoryError) else EXIT_ERROR
        _show(error)
    try:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - as the interpreter would
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001
        status = status or EXIT_ERROR
        _show(error)
    return status


def _execute(kind: str, code: str, namespace: dict[str, Any]) -> None:
    compiled = compile(code, _NAME, "exec", dont_inherit=True)
    if kind == "script":
        exec(compiled, namespace)
        return
    with io.BufferedRWPair(
        io.FileIO(PEER, "r", closefd=False), io.FileIO(PEER, "w", closefd=False)
    ) as stream:
        if kind == "serve":
            exec(compiled, namespace)
            serve(namespace, stream)  # pyright: ignore[reportArgumentType]
        else:
            namespace |= Tester(stream).names()  # pyright: ignore[reportArgumentType]
            exec(compiled, namespace)


def _exit_code(leaving: SystemExit) -> int:
    code = leaving.code
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    with contextlib.suppress(BaseException):  # its text is the program's own
        sys.stderr.write(f"{code}\n")
    return EXIT_ERROR


def _show(error: BaseException) -> None:
    with contextlib.suppress(BaseException):  # without memory or room there is nothing to say
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename != _NAME:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames, file=sys.stderr)
        sys.stderr.flush()
