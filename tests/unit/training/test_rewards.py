"""Group-wise reward normalisation."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.config.config import Config
from slime.data.sample import Sample
from slime.errors import DataError
from slime.training.rewards import (
    RewardNormalization,
    execution_keys,
    normalize_rewards,
    post_process_rewards,
    reward_normalization,
)

BOTH = RewardNormalization(center=True, scale=True)
CENTER = RewardNormalization(center=True, scale=False)


def sample(reward: float | None, group: int | None, execution: int | None = None) -> Sample:
    return Sample(reward=reward, group_index=group, rollout_id=execution)


def test_two_right_two_wrong_by_hand() -> None:
    # mean 0.5, unbiased std sqrt(4 x 0.25 / 3) = 0.57735
    rewards = normalize_rewards([1, 0, 0, 1], [0] * 4, range(4), BOTH)
    assert rewards == pytest.approx([0.8660239, -0.8660239, -0.8660239, 0.8660239], abs=1e-6)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=6), min_size=1, max_size=5))
def test_groups_of_any_size_match_a_naive_loop(groups: list[list[float]]) -> None:
    rewards = [reward for group in groups for reward in group]
    keys = [number for number, group in enumerate(groups) for _ in group]
    expected: list[float] = []
    for group in groups:
        mean, std = statistics.fmean(group), statistics.stdev(group)
        expected += [(reward - mean) / (std + 1e-6) for reward in group]
    result = normalize_rewards(rewards, keys, range(len(rewards)), BOTH)
    # abs: the naive mean of equal rewards leaves 1e-16, over 1e-6
    assert result == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_order_of_samples_does_not_matter() -> None:
    rewards, groups = [1.0, 5.0, 2.0, 7.0, 4.0], ["a", "b", "a", "b", "a"]
    interleaved = normalize_rewards(rewards, groups, range(5), BOTH)
    order = [0, 2, 4, 1, 3]
    grouped = normalize_rewards(
        [rewards[i] for i in order], [groups[i] for i in order], range(5), BOTH
    )
    assert [interleaved[i] for i in order] == grouped


@pytest.mark.parametrize("value", [0.9, 0.1, 1 / 3, 1e9 + 0.1, -0.7])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 10])
def test_group_of_equal_rewards_gets_exactly_zero(value: float, size: int) -> None:
    assert normalize_rewards([value] * size, [0] * size, range(size), BOTH) == [0.0] * size


def test_rewards_that_differ_by_rounding_stay_near_zero() -> None:
    rewards = normalize_rewards([0.1 + 0.2, 0.3, 0.3], [0] * 3, range(3), BOTH)
    assert max(map(abs, rewards)) < 1e-9


def test_siblings_of_a_fan_out_count_as_one_execution() -> None:
    # executions A (3 samples), B and C with rewards 1, 0, 0: as if there were three samples
    plain = normalize_rewards([1, 0, 0], [0] * 3, "ABC", BOTH)
    fanned = normalize_rewards([1, 1, 1, 0, 0], [0] * 5, "AAABC", BOTH)
    assert fanned == pytest.approx([plain[0]] * 3 + plain[1:])


def test_siblings_with_own_rewards_weigh_one_over_k() -> None:
    # A = (1, 0), B = 0, C = 1: mean (0.5 + 0 + 1) / 3 = 0.5,
    # variance ((0.25 + 0.25) / 2 + 0.25 + 0.25) / 2 = 0.375
    rewards = normalize_rewards([1, 0, 0, 1], [0] * 4, "AABC", BOTH)
    unit = 0.5 / (math.sqrt(0.375) + 1e-6)
    assert rewards == pytest.approx([unit, -unit, -unit, unit])


def test_group_of_one_execution_has_no_signal() -> None:
    assert normalize_rewards([0.7], [0], [0], BOTH) == [0.0]
    assert normalize_rewards([0.7, 0.7], [0, 0], [5, 5], BOTH) == [0.0, 0.0]


def test_without_scaling_only_the_mean_goes() -> None:
    assert normalize_rewards([1, 0, 0, 1], [0] * 4, range(4), CENTER) == [0.5, -0.5, -0.5, 0.5]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Config(n_samples_per_prompt=4), BOTH),
        (Config(n_samples_per_prompt=4, disable_grpo_std_normalization=True), CENTER),
        (Config(n_samples_per_prompt=1), CENTER),
        (
            Config(n_samples_per_prompt=4, disable_rewards_normalization=True),
            RewardNormalization(center=False, scale=False),
        ),
    ],
)
def test_flags_choose_the_normalisation(config: Config, expected: RewardNormalization) -> None:
    assert reward_normalization(config) == expected


def test_post_process_groups_by_index_not_by_position() -> None:
    samples = [sample(1, 7), sample(0, 3), sample(0, 7), sample(0, 3), sample(1, 3)]
    raw, rewards = post_process_rewards(
        samples, Config(n_samples_per_prompt=2, disable_grpo_std_normalization=True)
    )
    assert raw == [1, 0, 0, 0, 1]
    assert rewards == pytest.approx([0.5, -1 / 3, -0.5, -1 / 3, 2 / 3])


def test_post_process_picks_the_reward_key() -> None:
    samples = [Sample(reward={"score": value}, group_index=0) for value in (1.0, -1.0)]
    raw, _ = post_process_rewards(samples, Config(reward_key="score"))
    assert raw == [1.0, -1.0]


def test_removed_sample_without_reward_counts_nowhere() -> None:
    removed = Sample(group_index=0, remove_sample=True)
    samples = [sample(1, 0), removed, sample(0, 0)]
    raw, rewards = post_process_rewards(
        samples, Config(n_samples_per_prompt=3, disable_grpo_std_normalization=True)
    )
    assert (raw, rewards) == ([1.0, 0.0, 0.0], [0.5, 0.0, -0.5])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_reward_that_is_no_number_is_refused(bad: float | None) -> None:
    with pytest.raises(DataError, match="reward"):
        post_process_rewards([sample(bad, 0), sample(0, 0)], Config())


def test_missing_group_is_refused_only_when_it_matters() -> None:
    samples = [sample(1, None), sample(0, None)]
    with pytest.raises(DataError, match="group_index"):
        post_process_rewards(samples, Config())
    raw, rewards = post_process_rewards(samples, Config(disable_rewards_normalization=True))
    assert raw == rewards == [1, 0]


def test_samples_without_rollout_id_are_executions_of_their_own() -> None:
    keys = execution_keys([sample(0, 0, 2), sample(0, 0), sample(0, 0, 2), sample(0, 0)])
    assert keys[0] == keys[2] == 2
    assert len(set(keys)) == 3
