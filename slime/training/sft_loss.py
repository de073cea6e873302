"""Supervised fine-tuning: the negative log-likelihood of the trainable tokens."""

from slime.training.interface import LossTerms, TokenView
from slime.training.masked import masked_sum


def sft_loss(view: TokenView) -> LossTerms:
    """-sum of weight x log-prob; `weight` holds the mask over the step's denominator."""
    return LossTerms(-masked_sum(view.log_probs, view.columns["weight"]), {})
