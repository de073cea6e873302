"""A buffer filter as a user may write one; loaded by its dotted path."""

from typing import Any

from slime.data.sample import Sample


def newest_first(
    args: Any, rollout_id: int | None, buffer: list[list[Sample]], num_samples: int
) -> list[list[Sample]]:
    """The groups that came last, the last one first."""
    return [buffer.pop() for _ in range(min(num_samples, len(buffer)))]
