"""--environment-args as the dataclass that an adapter wants."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from slime.errors import ConfigError
from slime.plugins import nearest


def checked_settings[T](kind: type[T], settings: Mapping[str, Any], adapter: str) -> T:
    """`settings` as a `kind`.

    Args:
        kind: a dataclass with keywords only.
        adapter: its name in messages.

    Raises:
        ConfigError: one is unknown or missing.
    """
    items: Any = kind
    known = [item.name for item in fields(items)]
    for name in settings:
        if name not in known:
            raise ConfigError(
                f"--environment-args: {adapter} has no setting {name!r}{nearest(name, known)}; it "
                f"has {', '.join(known)}"
            )
    for item in fields(items):
        is_needed = item.default is MISSING and item.default_factory is MISSING
        if is_needed and item.name not in settings:
            raise ConfigError(f"--environment-args: {adapter} needs {item.name!r}")
    return kind(**settings)
