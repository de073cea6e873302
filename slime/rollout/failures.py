"""A failed sample: marked so that nothing of it trains, its cause kept."""

import logging
from typing import Any

from slime.data.sample import Sample
from slime.rollout.generate import set_prompt_ids
from slime.rollout.state import GenerateState

logger = logging.getLogger(__name__)


def mark_failed(args: Any, sample: Sample, category: str, error: Exception) -> None:
    """Make `sample` FAILED: none of its tokens train, its group's reward statistics leave it out.

    `metadata` tells why: `error_cat` and `error`. The first failure of each category in a round is
    logged with its traceback; there may be thousands.
    """
    state = GenerateState(args)
    if category not in state.failures:
        state.failures[category] = error
        logger.warning(
            "sample %s failed (%s); more failures of this kind in this round are only counted",
            sample.index,
            category,
            exc_info=error,
        )
    if not sample.multimodal_inputs:
        set_prompt_ids(state, sample)  # the trainer cannot pack a sample without any token
    sample.status = Sample.Status.FAILED
    sample.reward = None
    sample.remove_sample = True
    sample.loss_mask = [0] * sample.response_length
    sample.metadata = {
        **sample.metadata,
        "error_cat": category,
        "error": f"{type(error).__name__}: {error}",
    }
