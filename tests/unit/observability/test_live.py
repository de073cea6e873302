import io
import logging

import pytest
from rich.console import Console

from slime.observability.live import LiveView, fitting, now, sparkline, wants_live_view
from slime.observability.logging import setup_logging
from slime.observability.waits import WaitRow


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def _drawn(view: LiveView, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(view.render())
    return capture.get().splitlines()


def _view(width: int = 80) -> LiveView:
    return LiveView(Console(file=io.StringIO(), width=width), 4, 80)


def test_only_a_person_at_a_terminal_gets_it(monkeypatch: pytest.MonkeyPatch):
    assert wants_live_view(None, Terminal())
    assert not wants_live_view(None, io.StringIO())
    assert not wants_live_view(True, io.StringIO())
    assert not wants_live_view(False, Terminal())
    monkeypatch.setenv("CI", "1")
    assert not wants_live_view(None, Terminal())
    assert wants_live_view(True, Terminal())


@pytest.mark.parametrize("width", [40, 80, 120])
def test_every_line_fits_the_terminal(width: int):
    view = _view(width)
    view.progress(
        {"target": 32, "accepted": 24, "dropped": 3, "running": 800, "tokens": 9000, "seconds": 3.0}
    )
    for reward in range(30):
        view.rollout({"rollout/raw_reward": reward / 30, "rollout/response_len/mean": 8192.25})
    view.train({"train/grad_norm": 0.125, "train/loss": 1e-9})
    lines = _drawn(view, width)
    assert len(lines) == 6
    assert all(len(line) <= width for line in lines)


def test_it_shows_the_run_the_round_and_the_last_metrics():
    view = _view()
    view.progress(
        {"target": 32, "accepted": 24, "dropped": 0, "running": 64, "tokens": 900, "seconds": 3.0}
    )
    view.rollout({"rollout/raw_reward": 0.25})
    view.rollout({"rollout/raw_reward": 0.75, "rollout/response_len/mean": 9.5})
    view.round_ends(4)
    text = "\n".join(_drawn(view, 80))
    assert "5 of 80 rounds, 0 s gone, about 0 s left" in text
    assert "24 of 32 groups, 64 samples running, 300 tokens/s" in text
    assert "▁█" in text
    assert "0.75, response 9.5 tokens" in text
    assert "rollout idle" in text


def test_each_side_says_what_it_does():
    rows = [
        WaitRow(on="rollout manager", what="generate rollout 5", waited_s=65.0),
        WaitRow(on="train rank 0, train rank 1", what="train on rollout 4", waited_s=3.2),
    ]
    assert now(rows) == ["rollout generate rollout 5 (1:05)", "trainer train on rollout 4 (3 s)"]


def test_a_sparkline_goes_from_the_lowest_to_the_highest():
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▄▄"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(sparkline([float(i) for i in range(100)])) == 16


def test_what_does_not_fit_is_left_out_whole():
    assert fitting(["abc", "defg", "h"], 9) == "abc, defg"
    assert fitting(["abc"], 2) == ""


@pytest.mark.usefixtures("root_logger_as_before")
def test_log_lines_go_above_the_view_and_the_terminal_is_left_clean(
    capsys: pytest.CaptureFixture[str],
):
    setup_logging("INFO", "driver")
    terminal = Terminal()
    view = LiveView(Console(file=terminal, force_terminal=True, width=80), 0, 3)
    view.open()
    logging.getLogger("slime.x").warning("a line [with] brackets of %d characters", 200)
    view.close()
    logging.getLogger("slime.x").warning("after the view")
    drawn = terminal.getvalue()
    assert "a line [with] brackets of 200 characters" in drawn
    assert "after the view" not in drawn
    assert "after the view" in capsys.readouterr().err
    hidden, shown = drawn.rfind("\x1b[?25l"), drawn.rfind("\x1b[?25h")
    assert -1 < hidden < shown  # the cursor is back


def test_closing_twice_is_harmless():
    view = LiveView(Console(file=Terminal(), force_terminal=True, width=80), 0, 3)
    view.open()
    view.close()
    view.close()
