"""REINFORCE++ and its group-baseline variant: KL in the reward, whitened advantages."""

import torch
from torch import Tensor

from slime.training.algorithms.base import AdvantageInputs, Advantages, Algorithm
from slime.training.policy_loss import clipped_policy_loss, token_log_ratio


def discounted_sum(rewards: Tensor, gamma: float) -> Tensor:
    """[R] sum over k >= 0 of gamma^k x rewards[t + k], in log2(R) vector operations.

    Doubling: when every entry holds the sum of its next n rewards, adding gamma^n times the entry n
    further on makes it 2 n. No powers above 1, so long responses neither overflow nor lose digits.
    """
    total, shift, factor = rewards.clone(), 1, gamma
    while shift < total.numel():
        tail = torch.zeros_like(total)
        tail[:-shift] = total[shift:]
        total, shift, factor = total + factor * tail, shift * 2, factor * factor
    return total


def reinforce_plus_plus_advantages(inputs: AdvantageInputs) -> Advantages:
    """Discounted sum of -kl_coef x KL per token, plus the reward at the last trainable token.

    Source: Hu et al. 2025, arXiv:2501.03262, section 3.
    """
    rows: list[Tensor] = []
    for reward, mask, kl in zip(inputs.rewards, inputs.loss_masks, inputs.kl, strict=True):
        token_rewards = -inputs.kl_coef * kl * mask
        trainable = mask.nonzero()
        if trainable.numel():
            token_rewards[trainable[-1]] += reward
        rows.append(discounted_sum(token_rewards, inputs.gamma))
    return Advantages(rows, rows)


def baseline_advantages(inputs: AdvantageInputs) -> Advantages:
    """The centred reward minus kl_coef x KL at each token.

    Source: Hu et al. 2025, arXiv:2501.03262, the variant with a group baseline.
    """
    triples = zip(inputs.rewards, inputs.loss_masks, inputs.kl, strict=True)
    rows = [torch.full_like(mask, reward) - inputs.kl_coef * kl for reward, mask, kl in triples]
    return Advantages(rows, rows)


REINFORCE_PLUS_PLUS = Algorithm(
    name="reinforce_plus_plus",
    advantages=reinforce_plus_plus_advantages,
    log_ratio=token_log_ratio,
    policy_loss=clipped_policy_loss,
    shapes_rewards_by_kl=True,
    whitens_advantages=True,
)

REINFORCE_PLUS_PLUS_BASELINE = Algorithm(
    name="reinforce_plus_plus_baseline",
    advantages=baseline_advantages,
    log_ratio=token_log_ratio,
    policy_loss=clipped_policy_loss,
    centers_rewards=True,
    shapes_rewards_by_kl=True,
    whitens_advantages=True,
)
