"""Addresses, interfaces and ports of this machine."""

import datetime
import socket

import pytest

from slime.engines.rendezvous import (
    address_towards,
    interface_of,
    joined_store,
    listening_store,
    reserve_port,
)
from slime.errors import EngineUnavailable


def test_the_interface_of_an_address_is_found() -> None:
    names = {name for _, name in socket.if_nameindex()}
    assert interface_of("127.0.0.1") in names
    assert interface_of("127.0.0.3") == interface_of("localhost") == interface_of("127.0.0.1")
    assert interface_of("192.0.2.1") is None  # nobody's: reserved for documentation


def test_engines_elsewhere_are_told_an_address_that_they_reach() -> None:
    here = ["http://127.0.0.1:1", "http://127.0.0.2:2"]
    assert address_towards(here) == "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 1))
        except OSError:
            pytest.skip("this machine has no network")
        own = probe.getsockname()[0]
    assert address_towards([*here, "http://192.0.2.1:3"]) == own


def test_nobody_else_gets_a_reserved_port_until_a_store_listens_there() -> None:
    timeout = datetime.timedelta(seconds=10)
    port = reserve_port("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    store = listening_store("127.0.0.1", port, 2, timeout)
    store.set("word", "there")
    assert joined_store("127.0.0.1", port, 2, timeout).get("word") == b"there"
    with pytest.raises(EngineUnavailable, match="another process may have taken the port"):
        listening_store("127.0.0.1", port, 2, timeout)


def test_a_port_of_another_machine_cannot_be_reserved() -> None:
    with pytest.raises(EngineUnavailable, match=r"cannot listen at 192\.0\.2\.1:0"):
        reserve_port("192.0.2.1")
