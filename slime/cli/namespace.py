"""parse_args(): the flat namespace of a command line, for scripts of users around slime."""

import argparse
import sys
from collections.abc import Callable, Sequence

from slime.cli.parse import load_config
from slime.config.index import command_line_index
from slime.errors import ConfigError

AddArguments = Callable[[argparse.ArgumentParser], argparse.ArgumentParser | None]


def parse_args(
    add_custom_arguments: AddArguments | None = None, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """The `args` that functions of users get, without the facts of a run such as the router's address.

    Args:
        add_custom_arguments: adds arguments of the script's own to an argparse parser.
        argv: words after the script's name; by default those of this process.

    Raises:
        SystemExit: help was asked for, or an argument of the script's own is wrong.
        ConfigError: as `load_config`; or an argument of the script's own is a flag already.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    if add_custom_arguments is not None:
        parser = add_custom_arguments(parser) or parser
    # argparse's own list: there is no public way to read it.
    spellings = parser._option_string_actions
    taken = [name for name in spellings if command_line_index().find(name) is not None]
    if taken:
        raise ConfigError(f"{', '.join(taken)}: slime has a flag of that name; choose another one")
    own, rest = parser.parse_known_args(words)
    return load_config(rest).to_namespace(**vars(own))
