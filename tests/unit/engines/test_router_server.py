"""The router's command line; its key comes from the environment."""

import pytest

from slime.config.api_key import API_KEY_VARIABLE
from slime.engines.router_server import smg_argv


def test_a_key_that_begins_with_a_dash_is_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "-k3y")
    assert smg_argv(["--port", "4000"]) == ["smg", "launch", "--port", "4000", "--api-key=-k3y"]


def test_a_key_on_the_command_line_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "other")
    assert smg_argv(["--api-key", "mine"]) == ["smg", "launch", "--api-key", "mine"]


def test_outside_of_a_run_there_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert smg_argv([]) == ["smg", "launch"]
