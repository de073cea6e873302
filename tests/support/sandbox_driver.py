"""Starts a sandbox under circumstances that its caller made, and prints what came of it as JSON.

`sandbox_driver.py run` prints layers and the outcomes of programs on its standard input (a JSON list);
`sandbox_driver.py without-seccomp` forbids filters first, and prints the error.
"""

import asyncio
import json
import struct
import sys

from slime.errors import ConfigError
from slime.sandbox import lockdown, seccomp
from slime.sandbox.sandbox import Sandbox


def forbid_filters() -> None:
    """prctl(PR_SET_SECCOMP) fails from now on, as where a container's profile forbids it."""
    number = {"x86_64": 157, "aarch64": 167}[seccomp.platform.machine()]
    code = [
        (0x20, 0, 0, 0),
        (0x15, 0, 3, number),
        (0x20, 0, 0, 16),
        (0x15, 0, 1, 22),
        (0x06, 0, 0, 0x00050001),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    lockdown._prctl(38, 1)
    seccomp.install(b"".join(struct.pack("=HBBI", *item) for item in code))


async def run(programs: list[str]) -> None:
    """Print layers, and outcome, stdout and last line of stderr of each program."""
    sandbox = Sandbox().start()
    results = [await sandbox.run(code, cpu_s=2, wall_s=10) for code in programs]
    told = [(r.outcome, r.stdout, r.stderr.strip().rpartition("\n")[2]) for r in results]
    sandbox.close()
    json.dump({"layers": sandbox.layers, "results": told}, sys.stdout)


def main() -> None:
    """See above."""
    if sys.argv[1] == "run":
        asyncio.run(run(json.load(sys.stdin)))
        return
    forbid_filters()
    try:
        Sandbox().start()
    except ConfigError as error:
        json.dump({"error": str(error)}, sys.stdout)


if __name__ == "__main__":
    main()
