"""Names that projects of users import, and calls that their functions expect, stay."""

import ast
import functools
import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.public_names import HOOK_CALLS, PUBLIC, SAMPLE_FIELDS

from slime.config.index import command_line_index
from slime.data.sample import Sample
from slime.plugins import HOOKS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
PLUGINS = sorted((ROOT / "tests/support/user_plugins").glob("*.py"))
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names]


def parameters(text: str) -> list[inspect.Parameter]:
    """Of a signature written as text."""
    return list(inspect.signature(eval(f"lambda {text}: 0")).parameters.values())


def found_at(module: str, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda value: value)
def test_public_name_is_there_and_takes_its_arguments(module: str, name: str):
    value = found_at(module, name)
    text = PUBLIC[module][name]
    if text is None:
        return
    expected, actual = parameters(text), inspect.signature(value).parameters
    by_position = [p.name for p in actual.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = [p.name for p in expected if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position[: len(wanted)] == wanted
    for parameter in expected:
        assert actual[parameter.name].kind is parameter.kind
        assert actual[parameter.name].default == parameter.default
    for extra in set(actual) - {p.name for p in expected}:
        is_open = actual[extra].kind in (inspect.Parameter.VAR_KEYWORD,)
        assert is_open or actual[extra].default is not inspect.Parameter.empty, extra


def test_fields_of_a_sample_are_those_known_in_their_order():
    names = [item.name for item in fields(Sample)]
    assert names[: len(SAMPLE_FIELDS)] == SAMPLE_FIELDS
    assert [status.value for status in Sample.Status] == [
        "pending",
        "completed",
        "truncated",
        "aborted",
        "failed",
    ]
    Sample()  # every field has a default


def test_every_flag_that_takes_a_function_calls_it_as_documented():
    calls = {}
    for name, hook in HOOKS.items():
        inside = re.search(r"\((.*?)\)", hook.call)
        assert inside is not None
        words = [word.strip().partition("=")[0] for word in inside[1].split(",") if word.strip()]
        calls[name] = [word for word in words if word != "*"]
        expected = parameters(HOOK_CALLS[name])
        positional = [p for p in expected if p.kind is p.POSITIONAL_OR_KEYWORD]
        keywords = [p.name for p in expected if p.kind is p.KEYWORD_ONLY]
        assert hook.positional == len(positional), name
        assert list(hook.keywords) == keywords, name
        assert calls[name] == [p.name for p in expected], name
        assert command_line_index().find(f"--{name.replace('_', '-')}") is not None
    assert set(calls) == set(HOOK_CALLS)


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_plugins_of_the_tests_import_public_names_only(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("slime")]
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slime"):
            assert {alias.name for alias in node.names} <= set(PUBLIC[node.module or ""])


def test_page_names_everything_public():
    text = PAGE.read_text(encoding="utf-8")
    missing = [
        f"{module}.{name}"
        for module, name in NAMES
        if "." not in name and not re.search(rf"`{re.escape(module)}`[^\n]*`{name}\b", text)
    ]
    assert not missing


def test_paths_the_page_calls_missing_are_missing():
    text = PAGE.read_text(encoding="utf-8").partition("## Not kept")[2]
    named = re.findall(r"^\| `(slime(?:\.\w+)+)`", text, re.MULTILINE)
    assert named
    for path in named:
        module, _, name = path.rpartition(".")
        try:
            found = hasattr(importlib.import_module(module), name)
        except ImportError:
            continue
        assert not found, f"{path} exists; move it to the kept names"
