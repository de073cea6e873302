"""Door to `slime.cli.namespace`."""

from slime.cli.namespace import parse_args

__all__ = ["parse_args"]
