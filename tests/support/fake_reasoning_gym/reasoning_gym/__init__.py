"""A fake of the package, with the traps that the real one has."""

import time
from collections.abc import Callable
from typing import Any


def _exact(answer: Any, entry: dict[str, Any]) -> float:
    return 1.0 if answer == entry["answer"] else 0.01


def _raises(answer: Any, entry: dict[str, Any]) -> float:
    return float(int(answer) == int(entry["answer"]))


def _pays_for_garbage(answer: Any, entry: dict[str, Any]) -> float:
    return 1.0


def _hangs(answer: Any, entry: dict[str, Any]) -> float:
    time.sleep(60)
    return 1.0


def get_score_answer_fn(name: str) -> Callable[..., float]:
    """As the package has it."""
    known = {"exact": _exact, "raises": _raises, "pays": _pays_for_garbage, "hangs": _hangs}
    if name not in known:
        raise ValueError(f"Dataset {name} not registered")
    return known[name]
