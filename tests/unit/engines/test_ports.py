"""Ports that are kept for servers that listen later."""

import shutil
import socket
import subprocess
import sys

import pytest

from slime.engines.ports import hold_port
from slime.errors import EngineUnavailable

HOST = "127.0.0.1"


def test_servers_listen_one_after_another_at_a_port_that_is_held() -> None:
    port = hold_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((HOST, port))
    for _ in range(2):  # a server that died starts again at its address
        with socket.create_server((HOST, port)) as server:
            with socket.create_connection((HOST, port), timeout=5.0):
                server.accept()[0].close()
            with pytest.raises(OSError, match="in use"):
                socket.create_server((HOST, port))


def test_a_row_of_ports_is_held() -> None:
    first = hold_port(count=14)
    for port in range(first, first + 14):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((HOST, port))
        socket.create_server((HOST, port)).close()


def test_nobody_listens_at_a_held_port() -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, hold_port()), timeout=5.0)


def test_an_address_of_another_machine_has_no_ports() -> None:
    with pytest.raises(EngineUnavailable, match=r"192\.0\.2\.1 has no 2 free ports in a row"):
        hold_port("192.0.2.1", count=2)


# All 20 ports that a network of its own hands out are asked for, in each way in which one is handed out.
TAKE_ALL = """
import pathlib, socket
from slime.engines.ports import hold_port

pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40019")
held, server = hold_port(), socket.create_server(("127.0.0.1", 20000), backlog=100)

def bound(host, reuse):
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
    taken.bind((host, 0))
    return taken

ways = [lambda h=h, r=r: bound(h, r) for h in ("127.0.0.1", "") for r in (0, 1)]
ways.append(lambda: socket.create_connection(("127.0.0.1", 20000)))
for way in ways:
    taken = []
    try:
        while len(taken) < 20:
            taken.append(way())
    except OSError:
        pass
    ports = {one.getsockname()[1] for one in taken}
    assert ports == set(range(40000, 40020)) - {held}, (held, sorted(ports))
    for one in taken:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1" + bytes(7))  # no TIME_WAIT
        one.close()
print("all")
"""


def test_nobody_who_asks_for_any_port_gets_one_that_is_held() -> None:
    network = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*network, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this user or machine cannot make a network namespace")
    run = subprocess.run(
        [*network, sys.executable, "-c", TAKE_ALL],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.stdout == "all\n", run.stderr
