import json

import pytest

from slime.config.fields import CONVERTERS, Option
from slime.config.words import OptionIndex, given_from_value, merged_values, read_words
from slime.errors import ConfigError


def option(dest: str, type_name: str = "str", **more: object) -> Option:
    return Option(
        names=("--" + dest.replace("_", "-"),),
        dest=dest,
        type_name=type_name,
        convert=CONVERTERS[type_name],
        **more,  # pyright: ignore[reportArgumentType]
    )


INDEX = OptionIndex(
    [
        option("lr", "float"),
        option("steps", "int", choices=(1, 2, 3)),
        option("name"),
        option("ids", "int", nargs="+"),
        option("pair", "int", nargs=2),
        option("hook", kind="append"),
        option("urls", kind="extend", nargs="*"),
        option("extra", "json"),
        option("fast", kind="true"),
        option("no_bias", kind="false"),
        option("mode", kind="const", const="slow"),
        Option(names=("--grad",), negations=("--no-grad",), dest="grad", kind="negatable"),
    ]
)


def values(*argv: str) -> dict[str, object]:
    return merged_values(read_words(argv, INDEX))


def test_value_after_a_space_and_after_an_equals_sign() -> None:
    assert values("--lr", "0.1") == values("--lr=0.1") == {"lr": 0.1}


def test_negative_numbers_are_values() -> None:
    assert values("--lr", "-1e-6", "--ids", "-1", "2", "-3") == {"lr": -1e-6, "ids": (-1, 2, -3)}


def test_many_words_end_at_the_next_flag() -> None:
    assert values("--ids", "1", "2", "--lr", "3") == {"ids": (1, 2), "lr": 3.0}


def test_a_value_may_begin_with_dashes_after_an_equals_sign() -> None:
    assert values("--name=--x") == {"name": "--x"}


def test_an_empty_value_is_a_value() -> None:
    assert values("--name", "") == values("--name=") == {"name": ""}


def test_switches() -> None:
    assert values("--fast", "--no-bias", "--mode") == {
        "fast": True,
        "no_bias": False,
        "mode": "slow",
    }
    assert values("--grad")["grad"] is True
    assert values("--grad", "--no-grad")["grad"] is False


def test_the_last_one_wins_but_repeatable_flags_collect() -> None:
    assert values("--lr", "1", "--lr", "2") == {"lr": 2.0}
    assert values("--hook", "a", "--hook", "b") == {"hook": ("a", "b")}
    assert values("--urls", "a", "b", "--urls", "c") == {"urls": ("a", "b", "c")}


def test_json_is_read() -> None:
    assert values("--extra", '{"a": [1]}') == {"extra": {"a": [1]}}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr"], r"--lr needs a value \(float\)"),
        (["--lr", "--fast"], r"--lr needs a value"),
        (["--lr", "x"], r"--lr takes a value of type float, found 'x'"),
        (["--steps", "4"], r"--steps: no choice '4'; choices: 1, 2, 3"),
        (["--pair", "1"], r"--pair takes 2 values, found 1"),
        (["--fast=1"], r"--fast takes no value, found '1'"),
        (["--fast", "1"], r"the word '1' belongs to no flag"),
        (["--extra", "{"], r"--extra takes a value of type json"),
        (["--l", "1"], r"unknown flag --l\b"),
        (["--stesp", "1"], r"unknown flag --stesp; did you mean '--steps'\?"),
        (["--no-fast"], r"unknown flag --no-fast"),
        (["stray"], r"the word 'stray' belongs to no flag"),
    ],
)
def test_what_cannot_be_read_is_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_words(argv, INDEX)


def test_all_unknown_flags_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*--foo.*--bar"):
        read_words(["--foo", "1", "--lr", "1", "--bar"], INDEX)


def test_spellings_are_never_completed() -> None:
    with pytest.raises(ConfigError, match="did you mean '--steps'"):
        read_words(["--step", "1"], INDEX)


def test_where_two_owners_know_a_spelling_the_first_wins() -> None:
    first, second = option("lr", "float"), option("lr", "str", owner="megatron")
    index = OptionIndex([first, second])
    assert index.find("--lr") is first
    assert index.options == [first]


@pytest.mark.parametrize(
    ("dest", "value", "expected"),
    [
        ("lr", 1, {"lr": 1.0}),
        ("lr", "1e-6", {"lr": 1e-6}),
        ("ids", [1, 2], {"ids": (1, 2)}),
        ("ids", 1, {"ids": (1,)}),
        ("hook", ["a", "b"], {"hook": ("a", "b")}),
        ("extra", {"a": 1}, {"extra": {"a": 1}}),
        ("extra", [1], {"extra": [1]}),
        ("fast", True, {"fast": True}),
        ("fast", False, {}),
        ("grad", False, {"grad": False}),
        ("name", None, {}),
        ("name", "--x", {"name": "--x"}),
    ],
)
def test_values_of_a_yaml_file(dest: str, value: object, expected: dict[str, object]) -> None:
    found = INDEX.find(f"--{dest}")
    assert found is not None
    assert merged_values(given_from_value(found, found.name, value)) == expected


def test_a_switch_in_yaml_is_true_or_false() -> None:
    found = INDEX.find("--fast")
    assert found is not None
    with pytest.raises(ConfigError, match="write true or false"):
        given_from_value(found, "--fast", "yes")


def test_words_say_the_same_again() -> None:
    argv = ["--lr", "0.1", "--ids", "1", "2", "--extra", json.dumps({"a": 1}), "--no-grad"]
    given = read_words(argv, INDEX)
    assert [word for item in given for word in (item.spelling, *item.words)] == argv
