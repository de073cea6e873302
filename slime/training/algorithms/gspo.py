"""GSPO: GRPO with one ratio per sequence, the geometric mean of its tokens' ratios."""

from slime.training.algorithms.base import Algorithm, reward_on_every_token
from slime.training.policy_loss import clipped_policy_loss, sequence_log_ratio

# Source: Zheng et al. 2025, arXiv:2507.18071.
GSPO = Algorithm(
    name="gspo",
    advantages=reward_on_every_token,
    log_ratio=sequence_log_ratio,
    policy_loss=clipped_policy_loss,
    centers_rewards=True,
    scales_rewards=True,
    needs_old_log_probs=True,
)
