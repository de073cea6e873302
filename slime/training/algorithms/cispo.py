"""CISPO: GRPO's advantages, and a clipped, detached importance weight that drops no token."""

from slime.training.algorithms.base import Algorithm, reward_on_every_token
from slime.training.policy_loss import cispo_policy_loss, token_log_ratio

# Source: MiniMax-M1, arXiv:2506.13585. Usual bounds: --eps-clip 1.0 --eps-clip-high 4.0.
CISPO = Algorithm(
    name="cispo",
    advantages=reward_on_every_token,
    log_ratio=token_log_ratio,
    policy_loss=cispo_policy_loss,
    centers_rewards=True,
    scales_rewards=True,
)
