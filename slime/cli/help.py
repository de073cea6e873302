"""--help: every flag of all four owners, grouped, with default and state."""

import textwrap
from collections.abc import Iterator
from typing import Any, cast

from slime.config.fields import Option
from slime.config.index import command_line_index
from slime.config.states import State, state_of

_USAGE = """\
usage: python train.py --hf-checkpoint DIR --prompt-data FILE --rollout-batch-size N ... [flags]

Flags of slime come first; then Megatron's own, without prefix, the SGLang server's as --sglang-...
and the router's as --router-.... Write --flag value or --flag=value; spellings are not completed.
Later values win; --custom-config-path FILE.yaml wins over the command line.
"""
_TITLES = {
    "slime": "{}",
    "megatron": "Megatron: {}",
    "sglang": "SGLang server",
    "router": "Router: {}",
}
_WIDTH = 100
_INDENT = " " * 6


def help_text() -> str:
    """The whole of --help."""
    lines: list[str] = [_USAGE]
    title = ""
    for option in command_line_index().options:
        if title != (title := _TITLES[option.owner].format(option.group)):
            lines += ["", f"{title}:"]
        lines += _option_lines(option)
    return "\n".join(lines) + "\n"


def signature(option: Option) -> str:
    """How the flag is written, such as `--eps-clip FLOAT`."""
    names = ", ".join((*option.names, *option.negations))
    words = _metavar(option)
    return f"{names} {words}" if words else names


def default_text(option: Option) -> str:
    """The default as it is shown in help and docs; empty when there is none."""
    default = option.default
    if default is None or default in (False, (), [], {}):
        return ""
    if isinstance(default, (list, tuple)):
        return " ".join(str(item) for item in cast(tuple[Any, ...], default))
    return str(default)


def state_text(option: Option) -> str:
    """What happens when the flag is given, unless it simply works."""
    state = state_of(option)
    if state.state is State.WORKS and not state.only:
        return ""
    only = " or ".join(str(value) for value in state.only)
    if state.state is State.WORKS:
        return f"only {only}; {state.note}"
    head = f"refused unless {only}" if only else str(state.state)
    return f"{head}: {state.note}"


def _option_lines(option: Option) -> Iterator[str]:
    yield f"  {signature(option)}"
    default = default_text(option)
    text = option.help
    if default:
        text += f" (default: {default})"
    if state := state_text(option):
        text += f" [{state}]"
    if text:
        yield textwrap.fill(text.strip(), _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)


def _metavar(option: Option) -> str:
    if option.is_switch:
        return ""
    word = option.type_name.strip("_").upper()
    if option.choices is not None:
        word = "{" + ",".join(str(choice) for choice in option.choices) + "}"
    if isinstance(option.nargs, int):
        return " ".join([word] * option.nargs)
    return {"+": f"{word} ...", "*": f"[{word} ...]", "?": f"[{word}]"}.get(
        option.nargs or "", word
    )
