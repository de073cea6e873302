"""Claims about run_driver: every end of a run is one message and an exit code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.config_argv import base_argv

from slime.cli.driver import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, run_driver
from slime.cli.failures import without_ray_noise
from slime.config.api_key import run_api_key
from slime.config.config import Config
from slime.errors import ConfigError, EngineUnavailable
from slime.observability.logging import setup_logging

pytestmark = pytest.mark.usefixtures("root_logger_as_before")


def raising(error: BaseException, logs: Path | None = None) -> Callable[[Config], None]:
    def loop(config: Config) -> None:
        if logs is not None:
            setup_logging("INFO", "driver", folder=logs)
        raise error

    return loop


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("give --a or --b"), EXIT_USAGE, "slime: give --a or --b\n"),
        (EngineUnavailable("gone"), EXIT_FAILED, "slime: EngineUnavailable: gone\n"),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "slime: interrupted"),
    ],
)
def test_errors_on_purpose_are_one_message(
    error: BaseException, code: int, message: str, tmp_path: Path, capsys: Any
) -> None:
    assert run_driver(raising(error), base_argv(tmp_path)) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_a_bug_shows_its_last_frames_and_where_the_traceback_is(
    tmp_path: Path, capsys: Any
) -> None:
    loop = raising(KeyError("answer"), tmp_path / "logs")
    assert run_driver(loop, base_argv(tmp_path)) == EXIT_FAILED
    shown = capsys.readouterr().err
    log = tmp_path / "logs" / "driver.log"
    assert "slime: KeyError: 'answer'" in shown
    assert "in run_driver" not in shown
    assert "in loop\n    raise error" in shown
    assert f"This is a bug in slime or a plugin; the traceback is in {log}" in shown
    assert "Traceback" not in shown
    assert "Traceback (most recent call last)" in log.read_text()


def test_the_log_holds_the_traceback_of_an_error_on_purpose(tmp_path: Path) -> None:
    run_driver(raising(EngineUnavailable("gone"), tmp_path / "logs"), base_argv(tmp_path))
    assert "raise error" in (tmp_path / "logs" / "driver.log").read_text()


def test_a_bug_before_there_is_a_log_shows_the_whole_traceback(tmp_path: Path, capsys: Any) -> None:
    assert run_driver(raising(ZeroDivisionError()), base_argv(tmp_path)) == EXIT_FAILED
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert "the traceback is above" in shown


def test_the_noise_of_ray_is_left_out() -> None:
    text = (
        "rollout manager failed to start: \x1b[36mray::RolloutManager.start()\x1b[39m (pid=7)\n"
        '  File "/venv/ray/_private/worker.py", line 3, in call\n    return f()\n'
        '  File "/usr/lib/python3.12/concurrent/futures/thread.py", line 58, in run\n    x\n'
        '  File "/home/me/judge.py", line 9, in reward\n    return table[key]\n           ^^^^^\n'
        "KeyError: 'x'"
    )
    assert without_ray_noise(text) == (
        "rollout manager failed to start: ray::RolloutManager.start() (pid=7)\n"
        '  File "/home/me/judge.py", line 9, in reward\n    return table[key]\n           ^^^^^\n'
        "KeyError: 'x'"
    )


def test_the_loop_runs_with_a_key_that_stands_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLIME_API_KEY", raising=False)
    seen: list[str | None] = []

    def loop(config: Config) -> None:
        seen.append(run_api_key())
        assert "chosen" not in config.to_json()
        assert config.sglang_argv == {}

    assert run_driver(loop, base_argv(tmp_path, sglang_api_key="chosen")) == 0
    assert run_driver(loop, base_argv(tmp_path)) == 0
    assert run_driver(loop, base_argv(tmp_path)) == 0
    assert seen[0] == "chosen"
    assert None not in seen
    assert len(set(seen)) == 3
    assert run_api_key() is None
