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
    """Kills servers of `process`, one at a time, until it ends or `num_kills` is reached.

    Args:
        router_port: tells the router from the engines.
        pause_s: bounds of the random time between two kills, seconds.
        seed: of times and targets.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        router_port: int,
        num_kills: int,
        pause_s: tuple[float, float],
        seed: int,
    ) -> None:
        super().__init__(name="killer", daemon=True)
        self._process = process
        self._router_port = router_port
        self._num_kills = num_kills
        self._pause_s = pause_s
        self._chance = random.Random(seed)
        self.kills: list[Kill] = []

    def run(self) -> None:
        """Until all kills are done."""
        while len(self.kills) < self._num_kills:
            time.sleep(self._chance.uniform(*self._pause_s))
            if self._process.poll() is not None:
                return
            servers = servers_of(self._process.pid, self._router_port)
            if servers:
                port = self._chance.choice(sorted(servers))
                target = "router" if port == self._router_port else "engine"
                with contextlib.suppress(psutil.NoSuchProcess):
                    servers[port].kill()
                    self.kills.append(Kill(time.time(), target, port))


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
