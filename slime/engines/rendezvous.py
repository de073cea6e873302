"""A torch store that listens at one address; torch's own listens on every interface."""

import datetime
import socket
from importlib import import_module
from typing import Any

from slime.errors import EngineUnavailable

_BACKLOG = 1024


def listening_store(host: str, port: int, world_size: int, timeout: datetime.timedelta) -> Any:
    """The TCPStore that the members of a process group meet at, at `host` alone.

    `TCPStore(host, port, is_master=True)` takes `host` for its own connection only and listens on
    all interfaces, where anybody in the network could misdirect the members.

    Raises:
        EngineUnavailable: the port is taken, or `host` is no address of this machine.
    """
    dist: Any = import_module("torch.distributed")  # torch exports no types of its stores
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise EngineUnavailable(
            f"cannot listen at {host}:{port} for the members of a process group: {error}; another "
            "process may have taken the port meanwhile, so start again"
        ) from error
    return dist.TCPStore(
        host, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip
