"""Filters for --dynamic-sampling-filter-path: keep groups whose rewards differ."""

import statistics
from typing import Any

from slime.data.sample import Sample
from slime.rollout.filter_hub.base_types import DynamicFilterOutput

# Not 0: rewards such as 0.1 + 0.2 and 0.3 are equal to everyone but a computer.
MIN_STD = 1e-6


def check_reward_nonzero_std(
    args: Any, samples: list[Sample], **kwargs: Any
) -> DynamicFilterOutput:
    """Keep a group whose rewards have a standard deviation above 1e-6; equal ones teach nothing.

    Source: dynamic sampling of DAPO, arXiv:2503.14476, section 3.2.
    """
    rewards = [sample.get_reward_value(args) for sample in samples]
    if len(rewards) > 1 and statistics.pstdev(rewards) > MIN_STD:
        return DynamicFilterOutput(keep=True)
    return DynamicFilterOutput(keep=False, reason=f"zero_std_{round(rewards[0], 1)}")


def check_reward_nonzero_std_with_fallback(
    args: Any, samples: list[Sample], **kwargs: Any
) -> DynamicFilterOutput:
    """As `check_reward_nonzero_std`, but a dropped group may fill a batch that lacks groups."""
    verdict = check_reward_nonzero_std(args, samples)
    return DynamicFilterOutput(verdict.keep, verdict.reason, keep_when_insufficient=True)
