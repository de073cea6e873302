"""docs/add-a-model.md: its excerpts are in the files they name, its messages in the code."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/add-a-model.md").read_text(encoding="utf-8")
EXCERPTS = re.findall(r"^```python\n# (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE.partition("## 6.")[2], re.MULTILINE)


def test_the_page_shows_code_and_messages() -> None:
    assert len(EXCERPTS) == PAGE.count("```python") >= 5
    assert len(MESSAGES) >= 10


@pytest.mark.parametrize("number", range(len(EXCERPTS)))
def test_an_excerpt_is_what_stands_in_its_file(number: int) -> None:
    path, excerpt = EXCERPTS[number]
    text, start = (ROOT / path).read_text(encoding="utf-8"), 0
    for piece in excerpt.split("...\n"):
        found = text.find(piece, start)
        assert found >= 0, f"{path} has not:\n{piece}"
        start = found + len(piece)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_that_the_code_gives(message: str) -> None:
    files = (ROOT / "slime").rglob("*.py")
    assert any(message in path.read_text(encoding="utf-8") for path in files)


def test_the_suites_that_are_named_are_there() -> None:
    names = set(re.findall(r"tests/[\w/]+(?:\.py)?", PAGE))
    assert len(names) >= 6
    assert not [name for name in names if not (ROOT / name).exists()]


def test_the_layers_are_part_of_what_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "slime_plugins" in settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
