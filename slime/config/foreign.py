"""Values of the flags that belong to Megatron, SGLang and the router, as plugins expect them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from slime.config.fields import Option, options_of
from slime.config.megatron import MegatronConfig
from slime.config.recorded import load_table
from slime.config.words import Given, OptionIndex, merged_values, read_words


@functools.cache
def megatron_index() -> OptionIndex:
    """All options of Megatron's own parser."""
    return OptionIndex(load_table("megatron").options)


def megatron_values(argv: Sequence[str]) -> dict[str, Any]:
    """dest -> value of every Megatron option, defaults included.

    Values of a type that only Megatron knows (`--moe-layer-freq "[0]*3+[1]*58"`) stay words here;
    in the train actor Megatron's own parser reads them.
    """
    values: dict[str, Any] = {}
    for option in megatron_index().options:
        # As in argparse: of two options for one attribute the first gives its default.
        values.setdefault(option.dest, option.default)
    return values | merged_values(read_words(argv, megatron_index()))


def prefixed_values(owner: Literal["sglang", "router"], given: Mapping[str, Any]) -> dict[str, Any]:
    """`sglang_...` or `router_...` -> value of every option of `owner`, defaults included."""
    values = {f"{owner}_{option.dest}": option.default for option in load_table(owner).options}
    dests = {_bare_name(option.name, owner): option.dest for option in load_table(owner).options}
    return values | {f"{owner}_{dests.get(name, name)}": value for name, value in given.items()}


def engine_options(owner: Literal["sglang", "router"], given: list[Given]) -> dict[str, Any]:
    """Option name without prefix -> value; a switch that is given has the value True.

    The names are those of the command line, so `--` + name with dashes spells the option again.
    """
    options: dict[str, Any] = {}
    for item in given:
        if item.option.is_switch:
            options[_bare_name(item.spelling, owner)] = True
            continue
        name = _bare_name(item.option.name, owner)
        value = merged_values([item])[item.option.dest]
        if item.option.kind in ("append", "extend"):
            value = (*options.get(name, ()), *value)
        options[name] = list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value
    return options


@functools.cache
def _typed_options() -> tuple[Option, ...]:
    return tuple(options_of(MegatronConfig))


def typed_megatron_argv(config: MegatronConfig) -> tuple[str, ...]:
    """The words that tell Megatron's parser what MegatronConfig says, where it would not guess."""
    words: list[str] = []
    for option in _typed_options():
        value = getattr(config, option.dest)
        theirs = megatron_index().find(option.name)
        if theirs is None or value is None or value is False or value == theirs.default:
            continue
        words.append(option.name)
        if value is not True:
            words.append(str(value))
    return tuple(words)


def untyped_megatron_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """`argv` without the flags of MegatronConfig."""
    typed = {option.name for option in _typed_options()}
    given = [item for item in read_words(argv, megatron_index()) if item.option.name not in typed]
    return words_of(given)


def words_of(given: list[Given]) -> tuple[str, ...]:
    """The command line that says the same again."""
    return tuple(word for item in given for word in (item.spelling, *item.words))


def _bare_name(spelling: str, owner: str) -> str:
    return spelling.removeprefix(f"--{owner}-").replace("-", "_")
