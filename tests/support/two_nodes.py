"""Two nodes on this machine: namespaces, each with a network address that the other one reaches.

Nothing else reaches them, nor they anything else. What they do not share is the loopback and /dev/shm, by
which SGLang tells who is on its own node.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ADDRESSES = ("10.199.7.1", "10.199.7.2")
_OWN = ["--net", "--mount"]
_FOREVER = ["sleep", "infinity"]


class NoNamespaces(Exception):
    """This machine does not let us make any; says why."""


@dataclass(frozen=True)
class TwoNodes:
    """Attributes:
    pids: a process in each namespace.
    """

    pids: tuple[int, int]

    def on(self, node: int, *command: str) -> list[str]:
        """A command line that runs on a node."""
        own = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        target = f"--target={self.pids[node]}"
        return ["nsenter", target, "--net", "--mount", *own, "--", *command]


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """The nodes while the block runs; what still runs on them then is the caller's to end.

    Raises:
        NoNamespaces: this user may not, or a tool is missing.
    """
    started: list[subprocess.Popen[bytes]] = []
    try:
        try:
            nodes = _begin(started)
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "stderr", b"") or b""
            raise NoNamespaces(f"no network namespaces here: {error} {output.decode()}") from error
        yield nodes
    finally:
        for process in started:
            process.kill()
            process.wait()


def _begin(started: list[subprocess.Popen[bytes]]) -> TwoNodes:
    is_root = os.getuid() == 0
    user = [] if is_root else ["--user", "--map-root-user"]
    started.append(subprocess.Popen(["unshare", *user, *_OWN, *_FOREVER]))
    _wait_until_inside(started[0].pid)
    inside = [] if is_root else ["nsenter", f"--target={started[0].pid}", "--user", "--"]
    started.append(subprocess.Popen([*inside, "unshare", *_OWN, *_FOREVER]))
    _wait_until_inside(started[1].pid)
    nodes = TwoNodes((started[0].pid, started[1].pid))
    _run(*nodes.on(0, "ip", "link", "add", "node0", "type", "veth", "peer", "name", "node1"))
    _run(*nodes.on(0, "ip", "link", "set", "node1", "netns", str(nodes.pids[1])))
    for node, address in enumerate(ADDRESSES):
        _run(*nodes.on(node, "ip", "address", "add", f"{address}/24", "dev", f"node{node}"))
        _run(*nodes.on(node, "ip", "link", "set", f"node{node}", "up"))
        _run(*nodes.on(node, "ip", "link", "set", "lo", "up"))
        _run(*nodes.on(node, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"))
    return nodes


def _wait_until_inside(pid: int) -> None:
    """`unshare` has done its work when it has become the command."""
    for _ in range(1000):
        with open(f"/proc/{pid}/comm") as file:
            if file.read().strip() == _FOREVER[0]:
                return
        _run("sleep", "0.01")
    raise OSError(f"process {pid} did not get a network of its own")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)
