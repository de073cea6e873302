"""The critic's loss: squared distance to the returns, with a bound on how far a value may move."""

import torch
from torch import Tensor

from slime.training.interface import LossTerms, TokenView
from slime.training.masked import masked_sum


def value_loss(view: TokenView, *, clip: float) -> LossTerms:
    """max((v - R)^2, (held v - R)^2), without 1/2, summed with the column `weight`.

    A value outside old_values -+ clip gains nothing by moving on in its direction.

    Args:
        view: of a critic; its columns are `weight`, `returns` and `old_values`, the critic's
            values from before the first step of the round.
        clip: how far the held v may be from the old value.

    Returns:
        The loss and the metrics value_loss and value_clipfrac (share of values beyond the clip).

    Source: the `--value-clip` of PPO as in OpenAI Baselines' ppo2; Schulman et al. 2017,
    arXiv:1707.06347, has the loss without the clip.
    """
    values, weight = view.values, view.columns["weight"]
    assert values is not None, "the view is not a critic's"
    # Masked tokens may hold NaN, which 0 x NaN would carry into the gradient.
    returns, old = (
        torch.where(weight != 0, view.columns[name], 0.0) for name in ("returns", "old_values")
    )
    held = held_values(values, old, clip)
    loss = masked_sum(torch.maximum((values - returns).square(), (held - returns).square()), weight)
    is_clipped = (values.detach() - old).abs() > clip
    return LossTerms(
        loss,
        {
            "value_loss": loss.detach(),
            "value_clipfrac": masked_sum(is_clipped.float(), weight),
        },
    )


def held_values(values: Tensor, old_values: Tensor, clip: float) -> Tensor:
    """[T] values held within `clip` of the old ones; a held value has no gradient."""
    return old_values + (values - old_values).clamp(-clip, clip)
