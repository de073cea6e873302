"""The flags users know: names, defaults, states are frozen, docs are current, none is ignored."""

import re
from pathlib import Path

from slime.cli.flag_table import documented_options, flags_json, flags_markdown
from slime.config.config import slime_options
from slime.config.foreign import megatron_index
from slime.config.index import command_line_index, patched_megatron_options
from slime.config.recorded import load_table
from slime.config.states import (
    MEGATRON_GROUPS,
    MEGATRON_STATES,
    ROUTER_REFUSED,
    SGLANG_REFUSED,
    SLIME_STATES,
    State,
    state_of,
)

ROOT = Path(__file__).parents[2]

# Flags with one possible value, or whose value `resolve` turns into other settings.
READ_IN_CONFIG = {"--train-backend", "--custom-config-path"}


def test_names_defaults_and_states_are_the_frozen_ones() -> None:
    frozen = (ROOT / "tests" / "contracts" / "flags.json").read_text()
    assert flags_json() == frozen, "slime flags --json > tests/contracts/flags.json, if it is meant"


def test_docs_are_current() -> None:
    docs = (ROOT / "docs" / "flags.md").read_text()
    assert flags_markdown() == docs, "slime flags --markdown > docs/flags.md"


def test_every_state_belongs_to_a_flag() -> None:
    assert set(SLIME_STATES) <= {option.name for option in slime_options()}
    documented = {option.name for option in documented_options()}
    assert set(MEGATRON_STATES) <= documented
    assert set(MEGATRON_GROUPS) <= {option.group for option in load_table("megatron").options}
    assert set(SGLANG_REFUSED) <= {option.dest for option in load_table("sglang").options}
    assert set(ROUTER_REFUSED) <= {option.dest for option in load_table("router").options}


def test_flags_of_a_patched_megatron_are_unknown_to_a_stock_one() -> None:
    assert not [option for option in patched_megatron_options() if option.name in megatron_index()]


def test_every_flag_that_works_is_read_by_the_code() -> None:
    source = _code_that_reads_flags()
    unread = [
        option.name
        for option in slime_options()
        if state_of(option).state is State.WORKS
        and not re.search(rf"""(\.|["']){option.dest}\b""", source)
    ]
    assert set(unread) <= READ_IN_CONFIG, "accepted and ignored: implement it or change its state"


def test_states_that_are_not_plain_say_why() -> None:
    for option in command_line_index().options:
        state = state_of(option)
        assert state.note or (state.state is State.WORKS and not state.only), option.name


def test_values_that_work_are_choices_and_include_the_default() -> None:
    for option in slime_options():
        state = state_of(option)
        if state.state is State.WORKS and state.only:
            assert option.default in state.only
            assert option.choices is None or set(state.only) <= set(option.choices)


def _code_that_reads_flags() -> str:
    """All source but what lists, checks or shows flags."""
    lists_only = {"rules", "flag_checks", "states", "help", "flag_table", "plugins", "hooks"}
    files = [*(ROOT / "slime").rglob("*.py"), ROOT / "train.py", ROOT / "train_async.py"]
    kept = [file for file in files if file.stem not in lists_only]
    return "\n".join(file.read_text("utf-8") for file in kept)
