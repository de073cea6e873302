"""Addresses, interfaces and ports of this machine."""

import socket

import pytest

from slime.engines.rendezvous import address_towards, interface_of
from slime.engines.servers import free_port
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


def test_a_row_of_ports_is_free() -> None:
    first = free_port(count=14)
    for port in range(first, first + 14):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_an_address_of_another_machine_has_no_free_port() -> None:
    with pytest.raises(EngineUnavailable, match=r"192\.0\.2\.1 has no 2 free ports in a row"):
        free_port("192.0.2.1", count=2)
