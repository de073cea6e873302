"""Whatever is typed: values come back as they were written, or one ConfigError tells what is wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.config_argv import base_argv

from slime.cli.parse import load_config, parse
from slime.config.fields import Option
from slime.config.index import command_line_index
from slime.config.words import merged_values, read_words
from slime.errors import ConfigError

BOUNDED = settings(max_examples=100, deadline=None)
NUMBERS = [
    option
    for option in command_line_index().options
    if option.owner == "slime" and option.type_name in ("int", "float") and option.nargs is None
    if option.kind == "value" and option.choices is None
]
TEXTS = [
    option
    for option in command_line_index().options
    if option.type_name == "str" and option.nargs is None and option.choices is None
    if option.kind == "value"
]


@BOUNDED
@given(option=st.sampled_from(NUMBERS), value=st.integers(-(10**9), 10**9))
def test_numbers_come_back(option: Option, value: int) -> None:
    for words in ([option.name, str(value)], [f"{option.name}={value}"]):
        assert merged_values(read_words(words, command_line_index()))[option.dest] == value


@BOUNDED
@given(option=st.sampled_from(TEXTS), value=st.text(min_size=1, max_size=20))
def test_any_text_comes_back_when_joined(option: Option, value: str) -> None:
    words = [f"{option.name}={value}"]
    assert merged_values(read_words(words, command_line_index()))[option.dest] == value


FLAG = st.sampled_from([option.name for option in command_line_index().options])
WORD = FLAG | st.text(max_size=6) | st.integers().map(str) | st.just("--") | st.just("-1")


@BOUNDED
@given(argv=st.lists(WORD | FLAG.map(lambda name: name + "=x"), max_size=6))
def test_any_words_end_in_a_config_or_a_config_error(
    argv: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    if {"-h", "--help"} & set(argv):
        return
    for words in (argv, base_argv(folder) + argv):
        try:
            parse(words)
            load_config(words)
        except ConfigError:
            pass


def test_the_fuzzed_flags_are_many() -> None:
    assert len(NUMBERS) > 20
    assert len(TEXTS) > 20
    with pytest.raises(ConfigError):
        load_config(["--no-such-flag"])
