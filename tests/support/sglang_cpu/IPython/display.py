"""The two names SGLang imports."""

from typing import Any, NoReturn


class HTML:
    """Nothing can be shown here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        display()


def display(*args: Any, **kwargs: Any) -> NoReturn:
    """Raises always."""
    raise NotImplementedError("IPython.display has no stand-in on the CPU")
