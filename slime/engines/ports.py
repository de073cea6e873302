"""Ports for servers that listen much later than they are told where: an SGLang server imports for a minute."""

import contextlib
import socket

from slime.errors import EngineUnavailable

_TRIES = 100
_held: dict[tuple[str, int], socket.socket] = {}


def hold_port(host: str = "127.0.0.1", *, count: int = 1) -> int:
    """The first of `count` ports of `host` in a row that are kept for servers until this process ends.

    Each is bound, without listening. Linux then gives it to no connection and to nobody who asks for
    any port; a server told of the port, in whatever process, can listen there, again and again, if it
    sets SO_REUSEADDR as this does, which uvicorn, Rust's standard library, torch's stores and ZeroMQ do.
    A store of this process has `rendezvous.reserve_port`, which listens at once.

    Raises:
        EngineUnavailable: there is no such row.
    """
    for _ in range(_TRIES):
        with contextlib.ExitStack() as sockets, contextlib.suppress(OSError, OverflowError):
            row = [sockets.enter_context(_bound(host, 0))]
            first: int = row[0].getsockname()[1]
            row += [
                sockets.enter_context(_bound(host, port))
                for port in range(first + 1, first + count)
            ]
            _held.update(((host, first + i), held) for i, held in enumerate(row))
            sockets.pop_all()
            return first
    raise EngineUnavailable(
        f"{host} has no {count} free ports in a row ({_TRIES} tries); does it lie on this node?"
    )


def _bound(host: str, port: int) -> socket.socket:
    probe = socket.socket()
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    except OSError:
        probe.close()
        raise
    return probe
