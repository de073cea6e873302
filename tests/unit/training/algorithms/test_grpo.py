"""GRPO and those that share its advantages."""

import pytest
import torch

from slime.errors import ConfigError
from slime.training.algorithms.base import AdvantageInputs, load_algorithm, reward_on_every_token
from slime.training.algorithms.grpo import GRPO


def test_every_token_has_the_reward_of_its_sample() -> None:
    masks = [torch.tensor([1.0, 0.0]), torch.ones(3)]
    result = reward_on_every_token(AdvantageInputs(rewards=[0.5, -2.0], loss_masks=masks, kl=masks))
    assert [row.tolist() for row in result.advantages] == [[0.5, 0.5], [-2.0, -2.0, -2.0]]


def test_algorithms_load_by_name() -> None:
    assert load_algorithm("grpo") is GRPO
    with pytest.raises(ConfigError, match="grpx"):
        load_algorithm("grpx")
