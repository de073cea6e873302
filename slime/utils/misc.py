"""Door to `slime.plugins`."""

from slime.plugins import load_function

__all__ = ["load_function"]
