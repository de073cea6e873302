"""Kills servers of a live run at random moments, and reads from its log how each came back."""

import contextlib
import random
import re
import subprocess
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

_ENGINE = "slime.engines.embedded.server"
_LOST = re.compile(
    r"^(\S+ \S+) WARNING .*\| (?:\S+: )?(the router|engine \d+)(?: at)? (\S+) is lost: "
)
_SERVES = re.compile(r"^(\S+ \S+) WARNING .*\| (?:\S+: )?(the router|engine \d+) serves again ")


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
        at: wall clock, seconds.
        target: `engine` or `router`.
        port: where the server listened.
    """

    at: float
    target: str
    port: int


class Killer(threading.Thread):
    """Kills servers of `process`, one at a time, spread over the rounds of its run.

    Kill i falls at a random moment after `i * rounds_per_kill` rounds are done, so that there is
    always something to recover to; a killer who is faster than any server starts proves nothing.

    Args:
        metrics: the run's metrics.jsonl, which tells how many rounds are done.
        router_port: tells the router from the engines.
        rounds_per_kill: rounds of the run divided by the number of kills.
        delay_s: bounds of the random time after that round's end, seconds.
        seed: of times and targets.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        metrics: Path,
        router_port: int,
        num_kills: int,
        rounds_per_kill: float,
        delay_s: tuple[float, float],
        seed: int,
    ) -> None:
        super().__init__(name="killer", daemon=True)
        self._process = process
        self._metrics = metrics
        self._router_port = router_port
        self._num_kills = num_kills
        self._rounds_per_kill = rounds_per_kill
        self._delay_s = delay_s
        self._chance = random.Random(seed)
        self.kills: list[Kill] = []

    def run(self) -> None:
        """Until all kills are done, or the run has ended."""
        while len(self.kills) < self._num_kills and self._process.poll() is None:
            if rounds_done(self._metrics) < len(self.kills) * self._rounds_per_kill:
                time.sleep(0.02)
                continue
            time.sleep(self._chance.uniform(*self._delay_s))
            self._kill(self._chance.choice(("engine", "router")))

    def _kill(self, target: str) -> None:
        """Kill the router or one of the engines; nothing when none of them listens now."""
        servers = servers_of(self._process.pid, self._router_port)
        ports = [
            port for port in sorted(servers) if (port == self._router_port) == (target == "router")
        ]
        if not ports:
            return
        port = self._chance.choice(ports)
        with contextlib.suppress(psutil.NoSuchProcess):
            servers[port].kill()
            self.kills.append(Kill(time.time(), target, port))


def rounds_done(metrics: Path) -> int:
    """Rounds with a row in the file."""
    return metrics.read_text().count('"rollout/step"') if metrics.is_file() else 0


def servers_of(pid: int, router_port: int) -> dict[int, psutil.Process]:
    """Port -> process of the engines and the router that descend from `pid` and listen."""
    found: dict[int, psutil.Process] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words, ports = process.cmdline(), _ports(process)
                own = int(words[words.index("--port") + 1]) if _ENGINE in words else router_port
                if own in ports:
                    found[own] = process
    return found


def _ports(process: psutil.Process) -> list[int]:
    connections = process.net_connections("tcp")
    return [c.laddr[1] for c in connections if c.status == psutil.CONN_LISTEN]


def recovery_times(log: Path, kills: list[Kill]) -> list[float | None]:
    """Seconds from each kill until what was killed served again; None if the run ended before."""
    lost: list[tuple[float, str, int]] = []
    serves: list[tuple[float, str]] = []
    for line in log.read_text().splitlines():
        if found := _LOST.match(line):
            at, name, url = found.groups()
            lost.append((_seconds(at), name, int(url.rsplit(":", 1)[1])))
        elif found := _SERVES.match(line):
            serves.append((_seconds(found[1]), found[2]))
    return [_recovery_time(kill, lost, serves) for kill in kills]


def _recovery_time(
    kill: Kill, lost: list[tuple[float, str, int]], serves: list[tuple[float, str]]
) -> float | None:
    noticed = [(at, name) for at, name, port in lost if port == kill.port and at >= kill.at]
    if not noticed:
        return None
    at, name = min(noticed)
    back = [when for when, who in serves if who == name and when >= at]
    return min(back) - kill.at if back else None


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp.replace(",", ".")).timestamp()
