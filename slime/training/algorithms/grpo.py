"""GRPO: rewards relative to their group, PPO's clipped ratio per token."""

from slime.training.algorithms.base import Algorithm, reward_on_every_token
from slime.training.policy_loss import clipped_policy_loss, token_log_ratio

# Source: Shao et al. 2024, arXiv:2402.03300. Dr. GRPO is this with
# --disable-grpo-std-normalization.
GRPO = Algorithm(
    name="grpo",
    advantages=reward_on_every_token,
    log_ratio=token_log_ratio,
    policy_loss=clipped_policy_loss,
    centers_rewards=True,
    scales_rewards=True,
)
