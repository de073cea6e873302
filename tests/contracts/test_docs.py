"""What the docs tell people to type exists, and their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from slime.config.index import command_line_index
from slime.config.states import State, state_of
from slime.config.words import read_words
from slime.observability.metrics import metrics_markdown

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
# Options in the docs that belong to other programs.
OTHER_PROGRAMS = {
    "--add-missing-from-origin-hf",
    "--address",
    "--chunk-size",
    "--corpus",
    "--custom-weight-loader",  # of SGLang
    "--deadline-s",
    "--dry-run",
    "--force",
    "--gpus-per-node",
    "--help",
    "--input-dir",
    "--logdir",
    "--markdown",
    "--model-dir",
    "--no-deps",  # of pip
    "--nodes",
    "--origin-hf-dir",
    "--output-dir",
    "--port",
    "--rounds",
    "--save-dir",
    "--scale-fmt",
    "--source",
    "--version",
}

# `...` in an example stands for arguments of the reader's own.
_FENCE = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w-])")
_LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """The command lines of a page's shell examples, continued lines joined."""
    blocks = _FENCE.findall(page.read_text(encoding="utf-8"))
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    used = re.findall(r"`make ([a-z][a-z-]*)", text) + [
        word
        for line in commands(page)
        for word in re.findall(r"^(?:\w+=\S+ )*make ([a-z-]+)", line)
    ]
    assert set(used) <= targets


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_exist_and_those_of_examples_are_not_refused(page: Path):
    index = command_line_index()
    text = page.read_text(encoding="utf-8")
    mentioned = set(_FLAG.findall(text)) - OTHER_PROGRAMS
    assert not [flag for flag in sorted(mentioned) if index.find(flag) is None]
    for line in commands(page):
        _, _, words = line.partition("train.py ")
        argv = [word for word in shlex.split(words, comments=True) if not is_placeholder(word)]
        for given in read_words(argv, index):
            state = state_of(given.option)
            refused = state.state is State.REFUSED
            assert not refused or state.allows(given.value, given.option.default), line


def is_placeholder(word: str) -> bool:
    return word == "..." or word.startswith("${")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path):
    targets = _LINK.findall(page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_every_page_of_the_docs_can_be_reached_from_the_readme():
    reached, todo = set[Path](), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        reached.add(page)
        links = _LINK.findall(page.read_text(encoding="utf-8"))
        found = [(page.parent / link).resolve() for link in links if link.endswith(".md")]
        todo += [link for link in found if link not in reached]
    assert not [name(page) for page in PAGES if "docs" in page.parts and page not in reached]


def test_every_file_in_the_tree_of_the_architecture_page_exists():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = page.partition("## 2. The tree")[2].partition("## 3.")[0]
    files = {
        path.name
        for part in ("slime", "slime_plugins", "tools", "scripts")
        for path in (ROOT / part).rglob("*")
    }
    files |= {path.name for path in ROOT.glob("*.py")}
    assert not sorted(set(re.findall(r"\w+\.(?:py|sh)", tree)) - files)


def test_metrics_page_is_current():
    assert (ROOT / "docs/metrics.md").read_text(encoding="utf-8") == metrics_markdown()
