"""Where processes meet, at addresses that are chosen: torch's stores, gloo groups, network interfaces.

Torch's own store listens on every interface, and its gloo at the address of the host's name.
"""

import datetime
import ipaddress
import socket
from collections.abc import Sequence
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

import psutil

from slime.errors import EngineUnavailable

_BACKLOG = 1024
_reserved: dict[tuple[str, int], socket.socket] = {}


def reserve_port(host: str) -> int:
    """A port of `host` that is this process's from now on, for one `listening_store` there.

    Between a look for a free port and its use, seconds later, any connection of the machine may get it.

    Raises:
        EngineUnavailable: `host` is no address of this machine.
    """
    listener = _listener(host, 0)
    port: int = listener.getsockname()[1]
    _reserved[host, port] = listener
    return port


def listening_store(host: str, port: int, world_size: int, timeout: datetime.timedelta) -> Any:
    """The TCPStore that the members of a process group meet at, at `host` alone.

    `TCPStore(host, port, is_master=True)` takes `host` for its own connection only and listens on
    all interfaces, where anybody in the network could misdirect the members.

    Args:
        port: of `reserve_port`, or one that is free.

    Raises:
        EngineUnavailable: the port is taken, or `host` is no address of this machine.
    """
    dist: Any = import_module("torch.distributed")  # torch exports no types of its stores
    listener = _reserved.pop((host, port), None) or _listener(host, port)
    return dist.TCPStore(
        host, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise EngineUnavailable(
            f"cannot listen at {host}:{port} for the members of a process group: {error}; another "
            "process may have taken the port meanwhile, so start again"
        ) from error


def joined_store(host: str, port: int, world_size: int, timeout: datetime.timedelta) -> Any:
    """The TCPStore of somebody else, at `host`.

    Raises:
        torch.distributed.DistNetworkError: nobody listens there within `timeout`.
    """
    dist: Any = import_module("torch.distributed")
    return dist.TCPStore(
        host, port, world_size, is_master=False, timeout=timeout, wait_for_workers=False
    )


def gloo_group(
    store: Any, name: str, rank: int, world_size: int, *, host: str, timeout: datetime.timedelta
) -> Any:
    """A member's place in a gloo group beside torch's default group.

    Args:
        host: an address of the interface that the members reach each other by.

    Raises:
        RuntimeError: a member is missing after `timeout`.
    """
    # torch has no types for these, and `_Options` is private: docs/stock.md.
    dist: Any = import_module("torch.distributed")
    options = dist.ProcessGroupGloo._Options()
    # gloo's default resolves the host's name, which may be another interface.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, world_size, options)


def local_address(host: str, port: int) -> str:
    """This machine's address as `host` sees it; no packet is sent."""
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def address_towards(urls: Sequence[str]) -> str:
    """This machine's address that all of these servers reach: the loopback only when all are here."""
    parts = [urlsplit(url) for url in urls]
    found = [local_address(part.hostname or "", part.port or 80) for part in parts]
    others = [address for address in found if not ipaddress.ip_address(address).is_loopback]
    return (others or found)[0]


def interface_of(host: str) -> str | None:
    """Name of the network interface with this address of this machine; None where no interface has it."""
    address = str(socket.getaddrinfo(host, None)[0][4][0])
    # All of 127.0.0.0/8 is the loopback's, which lists one address.
    address = "127.0.0.1" if address.startswith("127.") else address
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None
