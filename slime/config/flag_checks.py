"""Checks of one flag at a time: may it be given, and is its number within bounds."""

import logging
import math

from slime.config.config import Config, slime_options
from slime.config.states import State, state_of
from slime.errors import ConfigError

logger = logging.getLogger(__name__)


def check_flag_states(config: Config) -> None:
    """Nothing, when every flag that differs from its default may be given.

    Raises:
        ConfigError: a refused flag, with the reason.
    """
    for option in slime_options():
        value = getattr(config, option.dest)
        state = state_of(option)
        if value == option.default or state.allows(value, option.default):
            if state.state is State.OWN_WAY and value != option.default:
                logger.info("%s: %s", option.name, state.note)
            continue
        shown = "" if option.is_switch else f" {value}"
        raise ConfigError(f"{option.name}{shown}: {state.note}")


def check_numbers(config: Config) -> None:
    """Nothing, when every number is finite and within the bounds of its flag.

    Raises:
        ConfigError: the first that is not.
    """
    for option in slime_options():
        value = getattr(config, option.dest)
        if option.type_name not in ("int", "float") or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise ConfigError(f"{option.name} must be a finite number, found {value}")
        if option.at_least is not None and value < option.at_least:
            raise ConfigError(f"{option.name} must be at least {option.at_least}, found {value}")
        if option.above is not None and value <= option.above:
            raise ConfigError(f"{option.name} must be above {option.above}, found {value}")
