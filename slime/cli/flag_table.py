"""The flag-state table: as text, as docs/flags.md, and as the frozen list of the tests."""

import json
from collections.abc import Iterator
from typing import Any

from slime.cli.help import default_text, signature, state_text
from slime.config.config import slime_options
from slime.config.fields import Option
from slime.config.foreign import megatron_index
from slime.config.index import patched_megatron_options
from slime.config.states import (
    MEGATRON_GROUPS,
    MEGATRON_STATES,
    ROUTER_REFUSED,
    SGLANG_REFUSED,
    state_of,
)

_HEAD = """\
# Flags

Written by `slime flags --markdown`; a test holds it current. A flag works, or slime does the same
its own way, or it is refused by name. No flag is accepted and ignored, and a flag nobody knows
stops the run before anything starts. `python train.py --help` shows all of them, with those of
Megatron, SGLang and the router.
"""
_MEGATRON_HEAD = """
## Megatron's own flags

They go through Megatron's own parser. These have a state; every other one is refused, as nobody
has tried it with slime's trainer.
"""


def documented_options() -> list[Option]:
    """Every flag with a state of its own: slime's, and Megatron's as launch scripts use them."""
    patched = {option.name: option for option in patched_megatron_options()}
    options = list(slime_options())
    for name in MEGATRON_STATES:
        option = patched.get(name) or megatron_index().find(name)
        if option is None:
            raise LookupError(f"states.py names {name}, but Megatron has no such option")
        options.append(option)
    return options


def flags_text() -> str:
    """`name  state` lines, for a terminal."""
    options = documented_options()
    width = max(len(option.name) for option in options)
    lines = [f"{option.name:<{width}}  {state_text(option) or 'works'}" for option in options]
    return "\n".join(lines) + "\n"


def flags_json() -> str:
    """The frozen list: name, owner, default and state of each documented flag."""
    rows = [
        {
            "name": option.name,
            "owner": option.owner,
            "default": _plain(option.default),
            "state": str(state_of(option).state),
        }
        for option in documented_options()
    ]
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def flags_markdown() -> str:
    """docs/flags.md."""
    return "\n".join((_HEAD, *_slime_tables(), _MEGATRON_HEAD, *_megatron_tables(), *_prefixed()))


def _slime_tables() -> Iterator[str]:
    group = ""
    for option in slime_options():
        if option.group != group:
            group = option.group
            yield f"\n## {group}\n\n| flag | default | meaning | state |\n|---|---|---|---|"
        yield _row(signature(option), default_text(option), option.help, state_text(option))


def _megatron_tables() -> Iterator[str]:
    yield "| flag | default | state |\n|---|---|---|"
    for option in documented_options():
        if option.owner == "megatron":
            yield _row(signature(option), default_text(option), state_text(option) or "works")
    yield "\n| group of Megatron's parser | why its other flags are refused |\n|---|---|"
    for group, reason in MEGATRON_GROUPS.items():
        yield _row(group, reason, code=False)


def _prefixed() -> Iterator[str]:
    yield (
        "\n## SGLang and the router\n\nEvery option of the SGLang server under `--sglang-`, every "
        "option of the router under `--router-`, except:\n\n| flag | why |\n|---|---|"
    )
    for owner, table in (("sglang", SGLANG_REFUSED), ("router", ROUTER_REFUSED)):
        for dest, reason in table.items():
            yield _row(f"--{owner}-{dest.replace('_', '-')}", reason)
    yield ""


def _row(first: str, *cells: str, code: bool = True) -> str:
    escaped = [cell.replace("|", "\\|") for cell in (first, *cells)]
    if code:
        escaped[0] = f"`{escaped[0]}`"
    return f"| {' | '.join(escaped)} |"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
