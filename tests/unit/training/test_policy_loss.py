"""Surrogates against loops over tokens, and by hand."""

import math

import pytest
import torch
from torch import Tensor

from slime.training.policy_loss import (
    ClipBounds,
    bounded_ratio,
    cispo_policy_loss,
    clipped_policy_loss,
    off_policy_sequence_mask,
    sequence_log_ratio,
    token_log_ratio,
)

CLIP = ClipBounds(low=0.2, high=0.28)


def segment_sum_of(segments: Tensor, count: int):
    return lambda x: torch.zeros(count, dtype=x.dtype).index_add(0, segments, x)


def random_tokens(seed: int = 0, count: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    log_probs = torch.randn(count).double().requires_grad_()
    return log_probs, log_probs.detach() + 0.4 * torch.randn(count), torch.randn(count).double()


def naive_clip(log_ratio: float, advantage: float, clip: ClipBounds) -> tuple[float, bool]:
    ratio = math.exp(log_ratio)
    held = min(max(ratio, 1 - clip.low), 1 + clip.high)
    loss = max(-ratio * advantage, -held * advantage)
    if clip.dual is not None and advantage < 0:
        loss = min(loss, -clip.dual * advantage)
    return loss, -held * advantage > -ratio * advantage


@pytest.mark.parametrize("dual", [None, 1.5])
def test_clipped_loss_matches_the_paper_token_by_token(dual: float | None) -> None:
    clip = ClipBounds(low=0.2, high=0.28, dual=dual)
    log_probs, old, advantages = random_tokens()
    result = clipped_policy_loss(log_probs, log_probs - old, advantages, clip)
    pairs = zip((log_probs - old).tolist(), advantages.tolist(), strict=True)
    expected = [naive_clip(log_ratio, advantage, clip) for log_ratio, advantage in pairs]
    assert result.per_token.tolist() == pytest.approx([loss for loss, _ in expected])
    assert result.is_clipped.tolist() == [clipped for _, clipped in expected]


def test_clipped_loss_by_hand() -> None:
    # ratios 1.5, 0.5 and 0.9
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 0.9]).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    result = clipped_policy_loss(log_ratio, log_ratio, advantages, CLIP)
    assert result.per_token.tolist() == pytest.approx([-1.28, 1.5, -0.5, 0.8, -1.8])
    assert result.is_clipped.tolist() == [True, False, False, True, False]


def test_clipped_tokens_have_no_gradient_and_free_ones_that_of_reinforce() -> None:
    log_ratio = torch.tensor([1.5, 1.0]).log().requires_grad_()
    result = clipped_policy_loss(log_ratio, log_ratio, torch.tensor([1.0, 3.0]), CLIP)
    result.per_token.sum().backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == pytest.approx([0.0, -3.0])


def test_dual_clip_bounds_a_bad_action_by_hand() -> None:
    log_ratio = torch.tensor([10.0, 10.0]).log()
    clip = ClipBounds(low=0.2, high=0.2, dual=3.0)
    result = clipped_policy_loss(log_ratio, log_ratio, torch.tensor([-1.0, 1.0]), clip)
    assert result.per_token.tolist() == pytest.approx([3.0, -1.2])


def test_huge_ratio_stays_finite_with_a_finite_gradient() -> None:
    log_ratio = torch.tensor([200.0, -200.0]).requires_grad_()
    result = clipped_policy_loss(log_ratio, log_ratio, torch.tensor([-1.0, 0.0]), CLIP)
    result.per_token.sum().backward()
    assert result.per_token.isfinite().all()
    assert log_ratio.grad is not None
    assert log_ratio.grad.isfinite().all()
    assert bounded_ratio(torch.tensor(1.0)).item() == pytest.approx(math.e)


def test_cispo_weighs_every_token_and_keeps_its_gradient() -> None:
    log_probs, old, advantages = random_tokens(1)
    result = cispo_policy_loss(log_probs, log_probs - old, advantages, CLIP)
    (gradient,) = torch.autograd.grad(result.per_token.sum(), log_probs)
    for i, log_ratio in enumerate((log_probs - old).tolist()):
        weight = min(max(math.exp(log_ratio), 0.8), 1.28)
        expected = -weight * advantages[i].item()
        assert result.per_token[i].item() == pytest.approx(expected * log_probs[i].item())
        assert gradient[i].item() == pytest.approx(expected)
        assert result.is_clipped[i].item() == (weight != math.exp(log_ratio))


def test_cispo_by_hand() -> None:
    log_probs = torch.tensor([-2.0])
    clip = ClipBounds(low=1.0, high=4.0)
    result = cispo_policy_loss(log_probs, torch.tensor([10.0]).log(), torch.tensor([0.5]), clip)
    assert result.per_token.item() == pytest.approx(5.0)


def test_sequence_ratio_is_the_geometric_mean_over_trainable_tokens() -> None:
    segments = torch.tensor([0, 0, 0, 1, 1])
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    log_probs = torch.tensor([0.1, 9.0, 0.5, -0.4, 0.0], requires_grad=True)
    ratio = sequence_log_ratio(
        log_probs, torch.zeros(5), mask, segments, segment_sum_of(segments, 2)
    )
    assert ratio.tolist() == pytest.approx([0.3, 0.3, 0.3, -0.2, -0.2])
    (gradient,) = torch.autograd.grad(ratio[0], log_probs)
    assert gradient.tolist() == pytest.approx([0.5, 0.0, 0.5, 0.0, 0.0])


def test_gspo_loss_of_a_sequence_is_its_clipped_ratio_times_its_advantage() -> None:
    segments = torch.zeros(4, dtype=torch.int64)
    log_probs = torch.tensor([0.5, 0.7, 0.1, 0.3], requires_grad=True)
    ratio = sequence_log_ratio(
        log_probs, torch.zeros(4), torch.ones(4), segments, segment_sum_of(segments, 1)
    )
    loss = clipped_policy_loss(log_probs, ratio, torch.full((4,), -1.0), CLIP).per_token
    assert loss.mean().item() == pytest.approx(math.exp(0.4))
    (gradient,) = torch.autograd.grad(loss.mean(), log_probs)
    assert gradient.tolist() == pytest.approx([math.exp(0.4) / 4] * 4)


def test_token_ratio_is_the_plain_difference() -> None:
    segments = torch.zeros(2, dtype=torch.int64)
    ratio = token_log_ratio(
        torch.tensor([-1.0, -2.0]),
        torch.tensor([-1.5, -1.0]),
        torch.ones(2),
        segments,
        segment_sum_of(segments, 1),
    )
    assert ratio.tolist() == [0.5, -1.0]


def test_only_bad_responses_that_drifted_are_masked() -> None:
    segments = torch.tensor([0, 0, 1, 1, 2, 2])
    log_ratio = torch.tensor([-0.3, -0.1, -0.3, -0.1, -0.01, 0.0])
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    dropped = off_policy_sequence_mask(
        log_ratio, advantages, torch.ones(6), segments, segment_sum_of(segments, 3), delta=0.1
    )
    assert dropped.tolist() == [True, True, False, False, False, False]
