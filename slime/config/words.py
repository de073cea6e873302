"""Reading command-line words: which flag each belongs to, and the values they spell."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from slime.config.fields import Option
from slime.errors import ConfigError, ConfigErrors
from slime.plugins import nearest, nearest_word


@dataclass(frozen=True)
class Given:
    """One flag as it was given.

    Attributes:
        option: whose it is and how it is read.
        spelling: as written, such as `--no-offload-train`.
        words: the words after it, as written.
        value: what they say; a tuple when the flag takes several words.
    """

    option: Option
    spelling: str
    words: tuple[str, ...]
    value: Any


@dataclass(frozen=True)
class WrongWord:
    """A flag that cannot be read; `option` is the one that was meant, as far as one can tell."""

    message: str
    option: Option | None


@dataclass(frozen=True)
class Words:
    """A command line: the flags that can be read, and those that cannot."""

    given: list[Given]
    wrong: list[WrongWord]


class OptionIndex:
    """All spellings of a set of options; where two owners know one spelling, the first wins."""

    def __init__(self, options: Iterable[Option]) -> None:
        self.options: list[Option] = []
        self._by_spelling: dict[str, Option] = {}
        for option in options:
            spellings = (*option.names, *option.negations)
            if any(spelling not in self._by_spelling for spelling in spellings):
                self.options.append(option)
            for spelling in spellings:
                self._by_spelling.setdefault(spelling, option)

    def __contains__(self, spelling: object) -> bool:
        return spelling in self._by_spelling

    def find(self, spelling: str) -> Option | None:
        """The option spelt exactly so."""
        return self._by_spelling.get(spelling)

    def nearest(self, spelling: str) -> str:
        """`; did you mean '--eps-clip'?` or nothing."""
        option_spelling = self._nearest_spelling(spelling)
        return f"; did you mean {option_spelling!r}?" if option_spelling else ""

    def nearest_option(self, spelling: str) -> Option | None:
        """The option that `nearest` names."""
        return self._by_spelling.get(self._nearest_spelling(spelling) or "")

    def _nearest_spelling(self, spelling: str) -> str | None:
        return nearest_word(spelling.lower().replace("_", "-"), tuple(self._by_spelling))


def read_words(argv: Sequence[str], index: OptionIndex) -> list[Given]:
    """Every flag of `argv` in order.

    `--flag value` and `--flag=value` mean the same. A word that begins with `--` is a flag; a value
    that does so is written `--flag=--value`. Spellings are never completed.

    Raises:
        ConfigError: all flags nobody knows, with the nearest spelling; all values that are missing,
            too much, of the wrong type or no choice.
    """
    found = read_all_words(argv, index)
    if len(found.wrong) == 1:
        raise ConfigError(found.wrong[0].message)
    if found.wrong:
        raise ConfigErrors(item.message for item in found.wrong)
    return found.given


def read_all_words(argv: Sequence[str], index: OptionIndex) -> "Words":
    """As `read_words`, but what cannot be read is among the answer instead of raised."""
    given: list[Given] = []
    wrong: list[WrongWord] = []
    position = 0
    while position < len(argv):
        spelling, is_joined, joined = argv[position].partition("=")
        option = index.find(spelling)
        position += 1
        following = _words_until_flag(argv, position)
        if option is None:
            wrong.append(
                WrongWord(_unknown_message(spelling, index), index.nearest_option(spelling))
            )
            position += len(following)
            continue
        if is_joined:
            words = (joined,)
        else:
            words = following[: _most_words(option)]
            position += len(words)
        try:
            given.append(make_given(option, spelling, words, is_joined=bool(is_joined)))
        except ConfigError as error:
            wrong.append(WrongWord(str(error), option))
    return Words(given, wrong)


def make_given(
    option: Option, spelling: str, words: tuple[str, ...], *, is_joined: bool = False
) -> Given:
    """`words` read the way `option` wants them.

    Raises:
        ConfigError: wrong number, wrong type, or no choice.
    """
    _check_count(option, spelling, words, is_joined)
    if option.is_switch:
        return Given(option, spelling, (), _switch_value(option, spelling))
    values = tuple(_convert(option, spelling, word) for word in words)
    value = values if option.nargs is not None and option.nargs != "?" else values[0]
    if option.nargs == "?" and not words:
        value = option.const
    return Given(option, spelling, words, value)


def given_from_value(option: Option, spelling: str, value: Any) -> list[Given]:
    """The same from a value of a YAML file; nothing when it says what is so anyway.

    Raises:
        ConfigError: the value is not of the option's type.
    """
    if value is None:
        return []
    if option.is_switch:
        return _given_from_bool(option, spelling, value)
    if isinstance(value, (list, tuple)) and option.type_name != "json":
        words = tuple(_word(item) for item in cast(Sequence[Any], value))
        if option.kind == "append":
            return [make_given(option, spelling, (word,)) for word in words]
        return [make_given(option, spelling, words)]
    return [make_given(option, spelling, (_word(value),))]


def merged_values(given: Iterable[Given]) -> dict[str, Any]:
    """dest -> value: the last one wins, repeatable flags collect."""
    values: dict[str, Any] = {}
    for item in given:
        dest = item.option.dest
        if item.option.kind == "append":
            values[dest] = (*values.get(dest, ()), item.value)
        elif item.option.kind == "extend":
            values[dest] = (*values.get(dest, ()), *item.value)
        else:
            values[dest] = item.value
    return values


def _given_from_bool(option: Option, spelling: str, value: Any) -> list[Given]:
    if not isinstance(value, bool):
        raise ConfigError(f"{spelling}: found {value!r}, write true or false")
    if option.kind == "negatable":
        spelling = option.name if value else option.negations[0]
        return [make_given(option, spelling, ())]
    return [make_given(option, spelling, ())] if value else []


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _words_until_flag(argv: Sequence[str], start: int) -> tuple[str, ...]:
    end = start
    while end < len(argv) and not argv[end].startswith("--"):
        end += 1
    return tuple(argv[start:end])


def _most_words(option: Option) -> int | None:
    """How many of the following words `option` may take; None: all."""
    if option.is_switch:
        return 0
    if option.nargs in ("*", "+"):
        return None
    return option.nargs if isinstance(option.nargs, int) else 1


def _check_count(option: Option, spelling: str, words: tuple[str, ...], is_joined: bool) -> None:
    if option.is_switch:
        if is_joined or words:
            raise ConfigError(f"{spelling} takes no value, found {words[0]!r}; leave it out")
        return
    if isinstance(option.nargs, int) and len(words) != option.nargs:
        raise ConfigError(f"{spelling} takes {option.nargs} values, found {len(words)}")
    if not words and option.nargs not in ("*", "?"):
        hint = "; write a value that begins with -- as " + f"{spelling}=--value"
        raise ConfigError(f"{spelling} needs a value ({option.type_name}), found none{hint}")
    if option.nargs is None and len(words) > 1:
        raise ConfigError(f"{spelling} takes one value, found {len(words)}: {' '.join(words)}")


def _switch_value(option: Option, spelling: str) -> Any:
    if option.kind == "const":
        return option.const
    if option.kind == "negatable":
        return spelling not in option.negations
    return option.kind == "true"


def _convert(option: Option, spelling: str, word: str) -> Any:
    try:
        value = option.convert(word)
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"{spelling} takes a value of type {option.type_name}, found {word!r}"
        ) from error
    if option.choices is not None and value not in option.choices:
        names = [str(choice) for choice in option.choices]
        hint = nearest(word, names)
        raise ConfigError(f"{spelling}: no choice {word!r}{hint}; choices: {', '.join(names)}")
    return value


def _unknown_message(word: str, index: OptionIndex) -> str:
    if word.startswith("--"):
        return f"unknown flag {word}{index.nearest(word)}"
    return f"the word {word!r} belongs to no flag; every setting is written --flag value"
