"""argv and YAML in, Config out: each flag goes to its owner."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from slime.cli.help import help_text
from slime.config.config import Config
from slime.config.foreign import engine_options, words_of
from slime.config.index import command_line_index
from slime.config.problems import Problems
from slime.config.resolve import resolve_into
from slime.config.states import State, state_of
from slime.config.words import Given, given_from_value, merged_values, read_all_words
from slime.errors import ConfigError

logger = logging.getLogger(__name__)


def load_config(argv: Sequence[str]) -> Config:
    """The checked and complete configuration that `argv` and its --custom-config-path describe.

    Raises:
        SystemExit: help was asked for and shown.
        ConfigError: flags nobody knows, values of the wrong type, combinations that cannot work; all
            of them at once.
    """
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(help_text())
        raise SystemExit(0)
    problems = Problems()
    config = resolve_into(problems, parse_into(problems, argv))
    problems.raise_all()
    return config


def parse(argv: Sequence[str]) -> Config:
    """What was given and nothing else: no value is derived and no rule across flags is checked.

    Raises:
        ConfigError: flags nobody knows, values of the wrong type, refused flags.
    """
    problems = Problems()
    config = parse_into(problems, argv)
    problems.raise_all()
    return config


def parse_into(problems: Problems, argv: Sequence[str]) -> Config:
    """As `parse`, but what is wrong goes into `problems` and stays out of the config."""
    found = read_all_words(argv, command_line_index())
    given, custom = found.given, dict[str, Any]()
    # A flag that was given correctly too may be gone by; what a wrong one meant may not.
    known = {item.option.dest for item in given}
    for word in found.wrong:
        meant = {word.option.dest} - known if word.option is not None else set[str]()
        problems.add(word.message, spoils=meant)
    path = merged_values(given).get("custom_config_path")
    if path is not None:
        with problems.caught():
            where = f"--custom-config-path {path}"
            given, custom = apply_yaml(given, read_yaml(path), where=where)
    megatron, sglang, router = (
        _accepted(_owned_by(owner, given), problems) for owner in ("megatron", "sglang", "router")
    )
    return Config(
        **merged_values(_owned_by("slime", given)),
        megatron_argv=words_of(megatron),
        sglang_argv=engine_options("sglang", sglang),
        router_argv=engine_options("router", router),
        custom=custom,
    )


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, no YAML, or no mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `name: value` lines, found {type(content).__name__}")
    return {str(key): value for key, value in cast(dict[Any, Any], content).items()}


def apply_yaml(
    given: list[Given], content: dict[str, Any], *, where: str
) -> tuple[list[Given], dict[str, Any]]:
    """`given` with the flags of `content` put in their place, and the keys that are no flag.

    The file wins over the command line, as users of the flag know it.

    Raises:
        ConfigError: values that are not of their flag's type, all at once.
    """
    index = command_line_index()
    problems = Problems()
    added: list[Given] = []
    replaced: set[str] = set()
    custom: dict[str, Any] = {}
    for key, value in content.items():
        spelling = "--" + key.replace("_", "-")
        option = index.find(spelling)
        if option is None:
            custom[key] = value
            hint = index.nearest(spelling)
            logger.warning("%s: %r is no flag; plugins find it in args%s", where, key, hint)
            continue
        replaced.add(option.name)
        try:
            added.extend(given_from_value(option, spelling, value))
        except ConfigError as error:
            problems.add(f"{where}: {error}")
    problems.raise_all()
    kept = [item for item in given if item.option.name not in replaced]
    return kept + added, custom


def _owned_by(owner: str, given: list[Given]) -> list[Given]:
    return [item for item in given if item.option.owner == owner]


def _accepted(given: list[Given], problems: Problems) -> list[Given]:
    """`given` without refused flags, which are noted, and without what slime does its own way.

    slime's own flags are checked by `resolve`.
    """
    accepted: list[Given] = []
    for item in given:
        state = state_of(item.option)
        if state.state is State.OWN_WAY:
            logger.info("%s: %s", item.spelling, state.note)
        elif state.allows(item.value, item.option.default):
            accepted.append(item)
        else:
            problems.add(" ".join((item.spelling, *item.words)) + f": {state.note}")
    return accepted
