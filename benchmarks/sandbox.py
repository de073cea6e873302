"""Programs per second through the sandbox, and their latency, at several numbers at a time.

    python benchmarks/sandbox.py [--programs 400] [--callers 1 8 32] [--packages numpy sympy]

Prints JSON. `latency` is what a caller waits, its turn included; `program` is from a program's start to its end,
`program_cpu` its processor time, the fork and the lock included, which other work on the machine disturbs less.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from typing import Any

from slime.sandbox.sandbox import Sandbox

# What is run: (code, standard input).
PROGRAMS = {
    "print": ("print(1 + 1)", ""),
    "sort 10,000 numbers": (
        "import sys\nprint(sum(sorted(map(int, sys.stdin))[:10]))",
        "\n".join(str(7919 * n % 10007) for n in range(10000)),
    ),
    "0.1 s of processor time": (
        "import time\nstart = time.process_time()\nwhile time.process_time() < start + 0.1: pass",
        "",
    ),
}
TESTED = (
    "def square(n): return n * n",
    "\n".join(f"assert square({n}) == {n * n}" for n in range(20)),
)


async def measure(sandbox: Sandbox, name: str, callers: int, count: int) -> dict[str, Any]:
    """Figures of `count` programs, `callers` waiting at any time."""
    waits: list[float] = []
    runs: list[float] = []
    processor: list[float] = []
    left = iter(range(count))

    async def call() -> None:
        for _ in left:
            began = time.perf_counter()
            if name in PROGRAMS:
                code, stdin = PROGRAMS[name]
                result = await sandbox.run(code, stdin=stdin)
            else:
                _, result, _ = await sandbox.test(*TESTED)
            if result.outcome != "ok":
                raise SystemExit(f"{name}: {result}")
            waits.append(time.perf_counter() - began)
            runs.append(result.seconds)
            processor.append(result.cpu_s)

    started = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(callers)))
    seconds = time.perf_counter() - started
    return {
        "case": name,
        "callers": callers,
        "programs": count,
        "programs_per_s": round(count / seconds, 1),
        "latency_ms": _percentiles(waits),
        "program_ms": _percentiles(runs),
        "program_cpu_ms": _percentiles(processor),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"p50": len(ordered) // 2, "p99": min(len(ordered) - 1, len(ordered) * 99 // 100)}
    return {key: round(1e3 * ordered[index], 2) for key, index in at.items()}


async def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--programs", type=int, default=400)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--packages", nargs="*", default=[])
    given = parser.parse_args()
    began = time.perf_counter()
    sandbox = Sandbox(packages=given.packages).start()
    start_s = time.perf_counter() - began
    await sandbox.run("pass")
    rows = [
        await measure(sandbox, name, callers, given.programs)
        for name in (*PROGRAMS, "20 assert statements, in a pair")
        for callers in given.callers
    ]
    sandbox.close()
    figures = {
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "layers": sandbox.layers,
        "packages": given.packages,
        "start_s": round(start_s, 2),
        "cases": rows,
    }
    json.dump(figures, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    asyncio.run(main())
