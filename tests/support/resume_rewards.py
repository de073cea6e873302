"""A reward every random model collects some of, the same for the same answer."""

from typing import Any


async def reward(args: Any, sample: Any, **kwargs: Any) -> float:
    """Share of the answer's characters that stand in the first half of the alphabet."""
    text = sample.response
    return sum(character < "e" for character in text) / max(1, len(text))
