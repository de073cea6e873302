from pathlib import Path
from typing import Any

import pytest

from slime.errors import ConfigError
from slime.plugins import accepts_keyword, check_signature, load_function, nearest


def test_the_same_path_gives_the_same_object() -> None:
    assert load_function("slime.plugins.load_function") is load_function
    assert load_function("slime.plugins:load_function") is load_function


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("function", "is no dotted path"),
        ("no_such_package.function", "there is no module 'no_such_package'"),
        ("slime.no_such_module.function", r"there is no module 'slime\.no_such_module'"),
        ("slime.plugins.load_funktion", "did you mean 'load_function'"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_function(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "imports_too_much",
            "import a_package_nobody_has\n",
            r"No module named 'a_package_nobody_has' at .*imports_too_much\.py:1",
        ),
        ("has_a_typo", "\ndef f(:\n", r"SyntaxError: .*has_a_typo\.py, line 2"),
        ("raises", "x = 1\nraise KeyError('table')\n", r"KeyError: 'table' at .*raises\.py:2"),
        ("ends_the_process", "import sys\nsys.exit(3)\n", r"SystemExit: 3 at .*process\.py:2"),
        ("is_no_text", "x = '\0'\n", "is_no_text' raised SyntaxError"),
    ],
)
def test_what_a_users_module_raises_at_import_is_told_with_its_line(
    name: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=message) as caught:
        load_function(f"{name}.f")
    assert f"python -c 'import {name}'" in str(caught.value)


async def good_generate(args: Any, sample: Any, sampling_params: Any) -> None: ...


async def good_generate_with_more(
    args: Any, sample: Any, sampling_params: Any, evaluation: bool = False, **kwargs: Any
) -> None: ...


def plain_generate(args: Any, sample: Any, sampling_params: Any) -> None: ...


async def narrow_generate(args: Any, sample: Any) -> None: ...


def good_rollout(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> None: ...


def rollout_without_evaluation(args: Any, rollout_id: int, data_source: Any) -> None: ...


def good_tis(**kwargs: Any) -> None: ...


async def async_filter(args: Any, samples: Any) -> None: ...


class GoodSource:
    def __init__(self, args: Any) -> None: ...
    def get_samples(self, num_samples: int) -> None: ...
    def add_samples(self, samples: Any) -> None: ...
    def save(self, rollout_id: int) -> None: ...
    def load(self, rollout_id: int) -> None: ...
    def __len__(self) -> int:
        return 0


class HalfSource:
    def __init__(self, args: Any) -> None: ...
    def get_samples(self, num_samples: int) -> None: ...


@pytest.mark.parametrize(
    ("dest", "function"),
    [
        ("custom_generate_function_path", good_generate),
        ("custom_generate_function_path", good_generate_with_more),
        ("rollout_function_path", good_rollout),
        ("custom_tis_function_path", good_tis),
        ("data_source_path", GoodSource),
    ],
)
def test_functions_that_fit_pass(dest: str, function: Any) -> None:
    check_signature(dest, function)


@pytest.mark.parametrize(
    ("dest", "function", "message"),
    [
        ("custom_generate_function_path", plain_generate, "must be `async def`"),
        ("custom_generate_function_path", narrow_generate, r"found \(args: Any, sample: Any\)"),
        ("rollout_function_path", rollout_without_evaluation, "evaluation"),
        ("dynamic_sampling_filter_path", async_filter, "a plain `def`"),
        ("data_source_path", HalfSource, "with add_samples, save, load, __len__ too"),
        ("custom_rm_path", 3, "must be callable as"),
    ],
)
def test_functions_that_do_not_fit_are_named(dest: str, function: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_signature(dest, function, path="m.f")


def test_accepts_keyword() -> None:
    assert accepts_keyword(good_generate_with_more, "evaluation")
    assert accepts_keyword(good_generate_with_more, "anything")
    assert not accepts_keyword(good_generate, "evaluation")


def test_nearest_is_silent_about_far_words() -> None:
    assert nearest("abc", ["abd", "xyz"]) == "; did you mean 'abd'?"
    assert nearest("abc", ["xyz"]) == ""
