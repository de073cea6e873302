"""REINFORCE++: discounted returns, KL in the reward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.training.algorithms.base import AdvantageInputs
from slime.training.algorithms.reinforce_plus_plus import (
    baseline_advantages,
    discounted_sum,
    reinforce_plus_plus_advantages,
)


@given(st.lists(st.floats(-5, 5), max_size=40), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_discounted_sum_matches_the_recursion(rewards: list[float], gamma: float) -> None:
    expected: list[float] = []
    total = 0.0
    for reward in reversed(rewards):
        total = reward + gamma * total
        expected.insert(0, total)
    result = discounted_sum(torch.tensor(rewards, dtype=torch.float64), gamma)
    assert result.tolist() == pytest.approx(expected, abs=1e-9)


def test_reward_lands_on_the_last_trainable_token_by_hand() -> None:
    inputs = AdvantageInputs(
        rewards=[2.0, 1.0],
        loss_masks=[torch.tensor([1.0, 1.0, 0.0]), torch.zeros(2)],
        kl=[torch.tensor([1.0, 0.5, 100.0]), torch.ones(2)],
        kl_coef=0.1,
        gamma=0.5,
    )
    result = reinforce_plus_plus_advantages(inputs)
    # token rewards: -0.1, 2 - 0.05, 0
    assert result.advantages[0].tolist() == pytest.approx([-0.1 + 0.5 * 1.95, 1.95, 0.0])
    assert result.advantages[1].tolist() == [0.0, 0.0]


def test_baseline_variant_takes_the_kl_off_every_token() -> None:
    inputs = AdvantageInputs(
        rewards=[1.0], loss_masks=[torch.ones(2)], kl=[torch.tensor([1.0, 3.0])], kl_coef=0.1
    )
    result = baseline_advantages(inputs)
    assert result.advantages[0].tolist() == pytest.approx([0.9, 0.7])
    assert result.returns[0].tolist() == result.advantages[0].tolist()
