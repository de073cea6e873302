"""Supervised fine-tuning as a rollout: the answers are read from the data, not generated."""

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson

from slime.data.chat import load_tokenizer
from slime.data.data_source import DataSource
from slime.data.loss_mask import LossMaskType, MultiTurnLossMaskGenerator
from slime.data.sample import Sample
from slime.errors import ConfigError, DataError
from slime.rollout.base_types import GroupFates, RolloutFnTrainOutput

logger = logging.getLogger(__name__)


def generate_rollout(
    args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """`rollout_batch_size` conversations with the mask of the assistant's turns, reward 0.

    The response begins at the first token that trains, so a multi-turn conversation keeps the later
    user turns in it, with mask 0.

    Raises:
        ConfigError: `evaluation`; there is no answer to judge.
        DataError: a prompt is no list of messages, or the template does not fit it.
    """
    if evaluation:
        raise ConfigError(
            "sft_rollout reads answers and cannot evaluate; set --eval-function-path "
            "slime.rollout.sglang_rollout.generate_rollout, or give no --eval-interval"
        )
    groups = data_source.get_samples(args.rollout_batch_size)
    generator = _mask_generator(
        args.hf_checkpoint,
        args.loss_mask_type,
        _frozen(args.apply_chat_template_kwargs),
    )
    for sample in (sample for group in groups for sample in group):
        fill_from_messages(sample, generator)
    return RolloutFnTrainOutput(samples=groups, fates=GroupFates({}, []))


def fill_from_messages(sample: Sample, generator: MultiTurnLossMaskGenerator) -> None:
    """Tokens, response and loss mask of the conversation in `sample.prompt`.

    A conversation without any token to train becomes FAILED and stays out of training.

    Raises:
        DataError: as `generate_rollout`.
    """
    if isinstance(sample.prompt, str):
        raise DataError(
            f"sample {sample.index}: SFT needs messages, found {sample.prompt!r:.60}; name their "
            "column with --input-key and leave --apply-chat-template out"
        )
    tokens, mask = generator.get_loss_mask(sample.prompt, sample.metadata.get("tools"))
    sample.tokens = tokens
    sample.reward = 0.0
    if 1 not in mask:
        logger.warning("sample %s has no token to train on and is left out", sample.index)
        sample.status = Sample.Status.FAILED
        sample.remove_sample = True
        sample.response_length, sample.loss_mask = 0, []
        return
    start = mask.index(1)
    sample.loss_mask = mask[start:]
    sample.response_length = len(sample.loss_mask)
    sample.response = generator.tokenizer.decode(tokens[start:])
    sample.status = Sample.Status.COMPLETED


@lru_cache(maxsize=4)
def _mask_generator(
    hf_checkpoint: str | None, loss_mask_type: LossMaskType, template_kwargs: bytes
) -> MultiTurnLossMaskGenerator:
    return MultiTurnLossMaskGenerator(
        load_tokenizer(hf_checkpoint), loss_mask_type, orjson.loads(template_kwargs)
    )


def _frozen(mapping: Mapping[str, Any]) -> bytes:
    """A hashable form of template variables, which come from JSON."""
    return orjson.dumps(mapping, option=orjson.OPT_SORT_KEYS)
