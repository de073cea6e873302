"""--fully-async: the rollout function, and what the rollout manager tells it between rounds."""

import logging
from pathlib import Path
from typing import Any

from slime.data.data_source import DataSource
from slime.rollout import loop
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, flatten
from slime.rollout.stream import Stream
from slime.rollout.unfinished import load_unfinished

__all__ = [
    "begin",
    "expect_save",
    "generate_rollout_fully_async",
    "note_weights",
    "restore",
]

logger = logging.getLogger(__name__)


def generate_rollout_fully_async(
    args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """The groups of one round, out of a stream that goes on when this returns; or one evaluation.

    The first call begins the stream. Rounds are asked for one after the other.

    Raises:
        DeadlineExceeded: not there within `args.rollout_timeout_s`.
        EngineError: every sample failed; carries the first cause.
    """
    stream = Stream.of(args)
    if evaluation:
        return loop.run(stream.evaluate(rollout_id))
    return loop.run(stream.next_round(rollout_id, data_source))


def begin(args: Any, num_rollout: int) -> None:
    """Say how many rounds the run has; no group is begun that no round would train."""
    Stream.of(args).set_num_rollout(num_rollout)


def note_weights(args: Any, trained_rounds: int) -> None:
    """Say that the engines have the weights after so many rounds: more groups may be begun."""
    loop.run(Stream.of(args).note_weights(trained_rounds))


def expect_save(args: Any) -> None:
    """Let the next round write the state of the data source, and of what is unfinished, as it leaves."""
    Stream.of(args).saves_next = True


def restore(args: Any, data_source: DataSource, rollout_id: int) -> None:
    """Go on with what was unfinished after round `rollout_id` of an earlier run.

    Without --fully-async the groups go to the data source.

    Raises:
        CheckpointError: they cannot be read.
    """
    if args.load is None or not Path(args.load).is_dir():
        return
    if not (groups := load_unfinished(args.load, rollout_id)):
        return
    num_tokens = sum(s.response_length for item in groups for s in flatten(item.group))
    logger.info("%d groups go on that were unfinished, with %d tokens", len(groups), num_tokens)
    if args.fully_async:
        Stream.of(args).restore(groups)
    else:
        data_source.add_samples([item.for_data_source() for item in groups])
