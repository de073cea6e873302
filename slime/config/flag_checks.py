"""Checks of one flag at a time: may it be given, and is its number within bounds."""

import logging
import math

from slime.config.config import Config, slime_options
from slime.config.fields import Option
from slime.config.problems import Problems
from slime.config.states import State, state_of

logger = logging.getLogger(__name__)


def check_flag_states(config: Config, problems: Problems) -> None:
    """Note every flag that differs from its default and may not be given, with the reason."""
    for option in slime_options():
        value = getattr(config, option.dest)
        state = state_of(option)
        if value == option.default or state.allows(value, option.default):
            if state.state is State.OWN_WAY and value != option.default:
                logger.info("%s: %s", option.name, state.note)
            continue
        shown = "" if option.is_switch else f" {value}"
        problems.add(f"{option.name}{shown}: {state.note}", spoils=(option.dest,))


def check_numbers(config: Config, problems: Problems) -> None:
    """Note every number that is not finite or out of the bounds of its flag."""
    for option in slime_options():
        value = getattr(config, option.dest)
        if option.type_name not in ("int", "float") or not isinstance(value, int | float):
            continue
        if wanted := _broken_bound(option, value):
            message = f"{option.name} must be {wanted}, found {value}"
            problems.add(message, spoils=(option.dest,))


def _broken_bound(option: Option, value: float) -> str | None:
    """What the number should be and is not."""
    if not math.isfinite(value):
        return "a finite number"
    if option.at_least is not None and value < option.at_least:
        return f"at least {option.at_least}"
    if option.above is not None and value <= option.above:
        return f"above {option.above}"
    return None
