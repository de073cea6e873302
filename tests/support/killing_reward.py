"""A reward that, at a given moment of a given round, kills or stops servers of its own run.

It runs in the rollout manager while other groups of the round are still being answered, so what it
hits has work to do. `SLIME_TEST_KILLS` says what: `1:engines:KILL 2:router:KILL 3:engine:STOP`.
"""

import os
import signal
from typing import Any

import psutil

from slime.data.sample import Sample
from slime.rollout.state import GenerateState

VARIABLE = "SLIME_TEST_KILLS"
_done: set[str] = set()


async def reward(args: Any, sample: Sample) -> float:
    """Share of the commonest token: differs between samples, and needs no trained model."""
    rollout_id = GenerateState(args).rollout_id
    for order in os.environ.get(VARIABLE, "").split():
        number, target, name = order.split(":")
        if order not in _done and rollout_id == int(number):
            _done.add(order)
            for pid in pids_of(target, args):
                os.kill(pid, signal.Signals[f"SIG{name}"])
    ids = sample.tokens[-sample.response_length :]
    return max(map(ids.count, set(ids))) / len(ids)


def pids_of(target: str, args: Any) -> list[int]:
    """Processes that listen at the addresses of `router`, `engine` (the first) or `engines`."""
    urls = list(args.engine_urls)
    if target == "router":
        ports = [args.sglang_router_port]
    else:
        ports = [int(url.rsplit(":", 1)[1]) for url in urls[: 1 if target == "engine" else None]]
    return [
        found.pid
        for found in psutil.net_connections("tcp")
        if found.pid and found.status == psutil.CONN_LISTEN and _port(found.laddr) in ports
    ]


def _port(address: Any) -> int:
    return address.port
