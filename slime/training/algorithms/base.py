"""Algorithm: what tells one policy-gradient method from another, as four small pieces."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from slime.data.batch import Ragged
from slime.registry import ALGORITHMS, lookup
from slime.training.policy_loss import ClipBounds, PolicyLoss

LogRatioFn = Callable[[Tensor, Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]
PolicyLossFn = Callable[[Tensor, Tensor, Tensor, ClipBounds], PolicyLoss]


@dataclass(frozen=True, kw_only=True)
class AdvantageInputs:
    """What advantages are made of; one entry per sample of this rank.

    Attributes:
        rewards: after normalisation.
        loss_masks: [R] each.
        kl: [R] each, policy against reference; zeros when nobody needs it.
        kl_coef: weight of the KL that is taken off the reward.
        gamma: discount per token.
    """

    rewards: Sequence[float]
    loss_masks: Sequence[Tensor]
    kl: Sequence[Tensor]
    kl_coef: float = 0.0
    gamma: float = 1.0


@dataclass(frozen=True)
class Advantages:
    """Advantages and returns, [R] fp32 per sample."""

    advantages: list[Tensor]
    returns: list[Tensor]


AdvantageFn = Callable[[AdvantageInputs], Advantages]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One value of `--advantage-estimator`.

    Attributes:
        name: as on the command line.
        advantages: rewards -> advantages per token.
        log_ratio: log of the importance ratio, per token or per sequence.
        policy_loss: the surrogate.
        centers_rewards: rewards are taken against the mean of their group.
        scales_rewards: and divided by its standard deviation.
        shapes_rewards_by_kl: `kl_coef` has an effect.
        whitens_advantages: always, not only under `--normalize-advantages`.
        needs_old_log_probs: also where they equal the current ones.
        needs_values: trains a critic.
    """

    name: str
    advantages: AdvantageFn
    log_ratio: LogRatioFn
    policy_loss: PolicyLossFn
    centers_rewards: bool = False
    scales_rewards: bool = False
    shapes_rewards_by_kl: bool = False
    whitens_advantages: bool = False
    needs_old_log_probs: bool = False
    needs_values: bool = False


def load_algorithm(name: str) -> Algorithm:
    """The algorithm registered under `name`.

    Raises:
        ConfigError: there is none.
    """
    return cast(Algorithm, lookup(ALGORITHMS, name))


def reward_on_every_token(inputs: AdvantageInputs) -> Advantages:
    """Each token of a sample has the sample's reward as its advantage and its return.

    Source: GRPO with outcome rewards, Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
    """
    lengths = [mask.numel() for mask in inputs.loss_masks]
    rows = Ragged.constant_rows(inputs.rewards, lengths).rows()
    return Advantages(rows, rows)
