"""What a dynamic sampling filter answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from slime.data.sample import Sample


@dataclass(frozen=True)
class DynamicFilterOutput:
    """Verdict on one finished group.

    Attributes:
        keep: train on it.
        reason: of a drop; counted as `rollout/dynamic_filter/drop_{reason}`.
        keep_when_insufficient: if it is dropped, take it after all rather than start another round
            of over-sampling.
    """

    keep: bool
    reason: str | None = None
    keep_when_insufficient: bool = False


def call_dynamic_filter(
    fn: Callable[..., DynamicFilterOutput | bool] | None, args: Any, samples: list[Sample]
) -> DynamicFilterOutput:
    """The filter's verdict; without a filter every group is kept, and a bool is wrapped.

    The filter sees only samples that have a reward. A group without any has nothing to teach and
    is dropped as "failed" before the filter is asked.
    """
    if fn is None:
        return DynamicFilterOutput(keep=True)
    judged = [sample for sample in samples if sample.reward is not None]
    if not judged:
        return DynamicFilterOutput(keep=False, reason="failed")
    verdict = fn(args, judged)
    for sample in samples:  # what it has read lies as lists since
        sample.pack()
    if isinstance(verdict, DynamicFilterOutput):
        return verdict
    return DynamicFilterOutput(keep=bool(verdict))


def drop_metrics(reasons: Mapping[str, int]) -> dict[str, int]:
    """`rollout/dynamic_filter/drop_{reason}`: groups dropped in one round."""
    return {
        f"rollout/dynamic_filter/drop_{reason}": count for reason, count in sorted(reasons.items())
    }
