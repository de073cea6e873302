"""The sandbox of this process: rewards and tools share one, so that its programs are counted together."""

import atexit
import threading
from typing import Any

from slime.sandbox.programs import Result
from slime.sandbox.sandbox import Sandbox

_lock = threading.Lock()
_sandboxes: dict[tuple[Any, ...], Sandbox] = {}


def shared_sandbox(args: Any) -> Sandbox:
    """The sandbox for the flags `--sandbox-*`; made on first use, closed at exit.

    Args:
        args: flat namespace with sandbox_programs, sandbox_memory_mb, sandbox_output_kb and
            sandbox_packages.
    """
    packages = tuple(args.sandbox_packages)
    settings = (
        args.sandbox_programs,
        args.sandbox_memory_mb,
        args.sandbox_output_kb,
        packages,
    )
    with _lock:
        if not _sandboxes:
            atexit.register(close)
        if settings not in _sandboxes:
            _sandboxes[settings] = Sandbox(
                max_programs=args.sandbox_programs,
                memory_bytes=args.sandbox_memory_mb << 20,
                output_bytes=args.sandbox_output_kb << 10,
                packages=packages,
            )
        return _sandboxes[settings]


async def run_python(args: Any, code: str, *, stdin: str = "") -> Result:
    """What a program did, within `sandbox_cpu_s` and `sandbox_wall_s`; see `Sandbox.run`.

    For custom generate functions: `await turns.call(run_python(args, code), timeout_s=300)`. A program
    also waits for its turn, so a tool's deadline should be longer than its own.
    """
    limits = {"cpu_s": args.sandbox_cpu_s, "wall_s": args.sandbox_wall_s}
    return await shared_sandbox(args).run(code, stdin=stdin, **limits)


def close() -> None:
    """End the sandbox; the next program starts a new one."""
    with _lock:
        while _sandboxes:
            _sandboxes.popitem()[1].close()
