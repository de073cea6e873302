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
from slime.config.resolve import resolve
from slime.config.states import State, state_of
from slime.config.words import Given, given_from_value, merged_values, read_words
from slime.errors import ConfigError

logger = logging.getLogger(__name__)


def load_config(argv: Sequence[str]) -> Config:
    """The checked and complete configuration that `argv` and its --custom-config-path describe.

    Raises:
        SystemExit: help was asked for and shown.
        ConfigError: a flag nobody knows, a value of the wrong type, a combination that cannot work.
    """
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(help_text())
        raise SystemExit(0)
    return resolve(parse(argv))


def parse(argv: Sequence[str]) -> Config:
    """What was given and nothing else: no value is derived and no rule across flags is checked.

    Raises:
        ConfigError: a flag nobody knows, a value of the wrong type, a refused flag.
    """
    index = command_line_index()
    given = read_words(argv, index)
    custom: dict[str, Any] = {}
    path = merged_values(given).get("custom_config_path")
    if path is not None:
        given, custom = apply_yaml(given, read_yaml(path), where=f"--custom-config-path {path}")
    return Config(
        **merged_values(_owned_by("slime", given)),
        megatron_argv=words_of(_accepted(_owned_by("megatron", given))),
        sglang_argv=engine_options("sglang", _accepted(_owned_by("sglang", given))),
        router_argv=engine_options("router", _accepted(_owned_by("router", given))),
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
        ConfigError: a value is not of its flag's type.
    """
    index = command_line_index()
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
            raise ConfigError(f"{where}: {error}") from error
    kept = [item for item in given if item.option.name not in replaced]
    return kept + added, custom


def _owned_by(owner: str, given: list[Given]) -> list[Given]:
    return [item for item in given if item.option.owner == owner]


def _accepted(given: list[Given]) -> list[Given]:
    """`given` without what slime does its own way; slime's own flags are checked by `resolve`.

    Raises:
        ConfigError: a refused flag.
    """
    accepted: list[Given] = []
    for item in given:
        state = state_of(item.option)
        if state.state is State.OWN_WAY:
            logger.info("%s: %s", item.spelling, state.note)
        elif state.allows(item.value, item.option.default):
            accepted.append(item)
        else:
            raise ConfigError(" ".join((item.spelling, *item.words)) + f": {state.note}")
    return accepted
