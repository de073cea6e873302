from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from slime.config.fields import Option, flag, options_of, parse_bool, parse_count


@dataclass(frozen=True, kw_only=True)
class Section:
    """Some title.

    More.
    """

    size: int = flag(3, "A size.", at_least=1)
    rate: float | None = flag(None, "A rate.")
    names: tuple[str, ...] | None = flag(None, "Names.")
    hooks: tuple[str, ...] = flag((), "Hooks.", action="append")
    kind: Literal["a", "b"] = flag("a", "A kind.")
    off: bool = flag(False, "Off.")
    on: bool = flag(True, "On.")
    maybe: bool | None = flag(None, "Maybe.")
    extra: Mapping[str, Any] = flag({}, "Extra.")
    derived: int = 0
    derived_list: list[int] = field(default_factory=list)


OPTIONS: dict[str, Option] = {option.dest: option for option in options_of(Section)}


def test_each_flag_is_an_option_and_derived_fields_are_none() -> None:
    assert " ".join(OPTIONS) == "size rate names hooks kind off on maybe extra"


def test_first_line_of_the_docstring_is_the_group() -> None:
    assert {option.group for option in OPTIONS.values()} == {"Some title"}


@pytest.mark.parametrize(
    ("dest", "kind", "nargs", "type_name"),
    [
        ("size", "value", None, "int"),
        ("rate", "value", None, "float"),
        ("names", "value", "+", "str"),
        ("hooks", "append", None, "str"),
        ("kind", "value", None, "str"),
        ("off", "true", None, "bool"),
        ("on", "negatable", None, "bool"),
        ("maybe", "negatable", None, "bool"),
        ("extra", "value", None, "json"),
    ],
)
def test_kind_follows_from_the_annotation(
    dest: str, kind: str, nargs: str | None, type_name: str
) -> None:
    option = OPTIONS[dest]
    assert (option.kind, option.nargs, option.type_name) == (kind, nargs, type_name)


def test_booleans_that_default_to_true_or_none_have_a_no_form() -> None:
    assert OPTIONS["on"].negations == ("--no-on",)
    assert OPTIONS["maybe"].negations == ("--no-maybe",)
    assert OPTIONS["off"].negations == ()


def test_literal_gives_choices() -> None:
    assert OPTIONS["kind"].choices == ("a", "b")


def test_bounds_are_kept() -> None:
    assert (OPTIONS["size"].at_least, OPTIONS["size"].above) == (1, None)


def test_a_dict_default_is_not_shared() -> None:
    assert Section().extra == {}
    assert Section().extra is not Section().extra


def test_fields_keep_their_defaults() -> None:
    section = Section()
    assert (section.size, section.rate, section.hooks, section.on) == (3, None, (), True)


def test_a_flag_of_two_types_is_a_mistake() -> None:
    @dataclass(frozen=True)
    class Bad:
        """Bad."""

        either: int | str = flag(1, "Either.")

    with pytest.raises(TypeError, match="one type besides None"):
        options_of(Bad)


@pytest.mark.parametrize(("word", "value"), [("True", True), ("on", True), ("0", False)])
def test_parse_bool_knows_usual_spellings(word: str, value: bool) -> None:
    assert parse_bool(word) is value


def test_parse_bool_refuses_other_words() -> None:
    with pytest.raises(ValueError, match="neither true nor false"):
        parse_bool("maybe")


@pytest.mark.parametrize(
    ("word", "value"),
    [("512", 512), ("1k", 1000), ("25.6k", 25600), ("1Ki", 1024), ("2M", 2 * 10**6)],
)
def test_counts_may_have_a_suffix(word: str, value: int) -> None:
    assert parse_count(word) == value


@pytest.mark.parametrize("word", ["", "k", "x", "1.5", "1.2345k", "nan", "inf"])
def test_other_counts_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="number"):
        parse_count(word)
