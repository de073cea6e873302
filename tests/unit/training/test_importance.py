"""Trainer/engine mismatch weights."""

import pytest
import torch

from slime.training.importance import masked_importance_weights, truncated_importance_weights

OLD = torch.tensor([0.5, 1.0, 3.0, 1.5]).log()
ROLLOUT = torch.zeros(4)


def test_truncated_weights_by_hand() -> None:
    result = truncated_importance_weights(OLD, ROLLOUT, low=0.8, high=2.0)
    assert result.ratio.tolist() == pytest.approx([0.5, 1.0, 3.0, 1.5])
    assert result.weights.tolist() == pytest.approx([0.8, 1.0, 2.0, 1.5])
    assert result.is_clipped.tolist() == [True, False, True, False]


def test_icepop_drops_what_lies_outside() -> None:
    result = masked_importance_weights(OLD, ROLLOUT, low=0.8, high=2.0)
    assert result.weights.tolist() == pytest.approx([0.0, 1.0, 0.0, 1.5])
    assert result.is_clipped.tolist() == [True, False, True, False]


@pytest.mark.parametrize("kind", [truncated_importance_weights, masked_importance_weights])
def test_weights_carry_no_gradient_and_stay_finite(kind) -> None:
    old = torch.tensor([300.0, -1.0], requires_grad=True)
    result = kind(old, torch.zeros(2), low=0.0, high=2.0)
    assert not result.weights.requires_grad
    assert result.weights.isfinite().all()
    assert result.ratio.isfinite().all()
