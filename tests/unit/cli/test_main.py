import json
from pathlib import Path

import pytest

from slime.cli.main import main


def test_flags_prints_the_state_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flags"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["--eps-clip"] == "works"
    assert lines["--release-train"].startswith("refused: ")
    assert lines["--moe-permute-fusion"].startswith("own way: ")


def test_flags_as_json_and_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flags", "--json"]) == 0
    assert {"name", "owner", "default", "state"} == set(json.loads(capsys.readouterr().out)[0])
    assert main(["flags", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# Flags")


@pytest.mark.parametrize("argv", [["flags", "--yaml"], ["fly"]])
def test_what_the_command_does_not_know_is_an_error(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert repr(argv[-1]) in capsys.readouterr().err


def test_no_command_shows_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: slime")


def test_train_runs_the_loop_of_train_py_with_its_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text("def train(config):\n    raise AssertionError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "train", raising=False)
    assert main(["train", "--no-such-flag"]) == 2
    assert "unknown flag --no-such-flag" in capsys.readouterr().err


def test_check_judges_flags_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "train.py", "--no-such-flag"]) == 2
    assert "unknown flag --no-such-flag" in capsys.readouterr().err
    assert main(["check"]) == 0
    assert capsys.readouterr().out.startswith("usage: slime check")
