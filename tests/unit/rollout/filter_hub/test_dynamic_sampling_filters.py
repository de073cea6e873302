from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from slime.data.sample import Sample
from slime.rollout.filter_hub.base_types import (
    DynamicFilterOutput,
    call_dynamic_filter,
    drop_metrics,
)
from slime.rollout.filter_hub.dynamic_sampling_filters import (
    check_reward_nonzero_std,
    check_reward_nonzero_std_with_fallback,
)

ARGS = SimpleNamespace(reward_key=None, eval_reward_key=None)


def group(*rewards: Any) -> list[Sample]:
    return [Sample(reward=reward) for reward in rewards]


def test_group_of_different_rewards_is_kept():
    assert check_reward_nonzero_std(ARGS, group(0.0, 1.0)).keep
    assert check_reward_nonzero_std_with_fallback(ARGS, group(0.0, 1.0)).keep


@pytest.mark.parametrize("rewards", [(1.0, 1.0), (0.3, 0.1 + 0.2), (1.0,), (1.0, 1.0 + 1e-6)])
def test_group_of_equal_rewards_is_dropped(rewards: tuple[float, ...]):
    verdict = check_reward_nonzero_std(ARGS, group(*rewards))
    assert not verdict.keep
    assert not verdict.keep_when_insufficient
    assert verdict.reason == f"zero_std_{round(rewards[0], 1)}"


def test_fallback_keeps_a_dropped_group_in_reserve():
    verdict = check_reward_nonzero_std_with_fallback(ARGS, group(0, 0))
    assert verdict == DynamicFilterOutput(False, "zero_std_0.0", keep_when_insufficient=True)


def test_filter_sees_only_rewarded_samples():
    verdict = call_dynamic_filter(check_reward_nonzero_std, ARGS, group(0.0, None, 1.0))
    assert verdict.keep
    assert call_dynamic_filter(check_reward_nonzero_std, ARGS, group(None)).reason == "failed"


def test_no_filter_keeps_and_bools_are_wrapped():
    assert call_dynamic_filter(None, ARGS, group(None)).keep
    assert not call_dynamic_filter(lambda args, samples: False, ARGS, group(1.0)).keep


def test_drops_are_counted_by_reason():
    counts = Counter({"zero_std_1.0": 2, "failed": 1})
    assert drop_metrics(counts) == {
        "rollout/dynamic_filter/drop_failed": 1,
        "rollout/dynamic_filter/drop_zero_std_1.0": 2,
    }
