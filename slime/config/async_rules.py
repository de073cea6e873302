"""Rules about generating all the time, beside the training."""

import logging
from collections.abc import Iterator

from slime.config.config import Config

logger = logging.getLogger(__name__)

DEFAULT_ROLLOUT = "slime.rollout.sglang_rollout.generate_rollout"
FULLY_ASYNC_ROLLOUT = "slime.rollout.fully_async_rollout.generate_rollout_fully_async"


def fully_async(config: Config) -> Iterator[str]:
    """What is wrong with the flags of --fully-async."""
    if not config.fully_async:
        return
    if config.rollout_function_path != FULLY_ASYNC_ROLLOUT:
        yield (
            f"--fully-async and --rollout-function-path {config.rollout_function_path}: a function that runs "
            "one round cannot generate between rounds; leave one of them out (--custom-generate-function-path "
            "works with both)"
        )
    if config.debug_train_only:
        yield "--fully-async: nothing is generated with --debug-train-only; leave it out"
    if config.mask_offpolicy_in_partial_rollout:
        yield (
            "--mask-offpolicy-in-partial-rollout: with --fully-async a round does not end an answer, so nothing "
            "is resumed in a later one; leave it out, --use-tis corrects older tokens"
        )
    least = config.update_weights_interval - 1
    if config.max_weight_staleness < least:
        yield (
            f"--max-weight-staleness {config.max_weight_staleness} with --update-weights-interval "
            f"{config.update_weights_interval}: engines would have no weights young enough for the last rounds "
            f"before a sync; give at least {least}"
        )
    _warn(config)


def _warn(config: Config) -> None:
    """Say what does nothing here, or is seldom meant."""
    corrects = config.use_tis or config.use_rollout_logprobs or config.loss_type != "policy_loss"
    if config.max_weight_staleness > 0 and not corrects and not config.debug_rollout_only:
        logger.warning(
            "--fully-async trains on samples up to %d rounds old as if they were fresh; --use-tis corrects "
            "that by the engines' log-probs (or --use-rollout-logprobs, which clips against them)",
            config.max_weight_staleness,
        )
    submitted = config.over_sampling_batch_size
    if submitted not in (None, config.rollout_batch_size):
        logger.warning(
            "--over-sampling-batch-size %s has no effect with --fully-async: there are always groups on "
            "their way",
            submitted,
        )
