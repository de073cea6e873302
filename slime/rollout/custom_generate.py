"""The call of a user's generate function: its deadline, its requests, and a look at what it returns."""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Any, cast

from slime.data.sample import Sample
from slime.engines.request_scope import request_scope
from slime.errors import DataError, DeadlineExceeded
from slime.observability.waits import WARN_FRACTION, waiting
from slime.plugins import accepts_keyword, load_function
from slime.rollout.base_types import Execution
from slime.rollout.failures import mark_failed
from slime.rollout.state import GenerateState

Status = Sample.Status


async def custom_generate(
    args: Any,
    path: str,
    sample: Sample,
    sampling_params: dict[str, Any],
    seed: int | None,
    evaluation: bool,
) -> Execution:
    """What the user's function returns, checked, with what it took in `Sample.usage`.

    Args:
        path: of the function.
        sampling_params: handed on without a seed, as a function sends them with every turn.
        seed: of the sample; each request gets one made of it, see request_seeds.py.

    Raises:
        DataError: no Sample or list of them, siblings without a common `rollout_id`, or lists in a
            sample that do not fit its tokens.
    """
    function = load_function(path)
    keywords = {"evaluation": evaluation} if accepts_keyword(function, "evaluation") else {}
    used_before, waited_before = sample.usage or {}, sample.non_generation_time
    started = time.monotonic()
    with request_scope(seed) as scope:
        call = function(args, sample, sampling_params, **keywords)
        result = await _within_deadline(args, path, call)
    usage = scope.usage.added_to(used_before, seconds=time.monotonic() - started)
    parts: list[Any] = cast(list[Any], result) if isinstance(result, list) else [result]
    if not parts or not all(isinstance(part, Sample) for part in parts):
        raise DataError(
            f"{path} returned {result!r:.80}; it must return a Sample or a list of them"
        )
    for part in parts:
        _complete(args, path, part)
        if part.non_generation_time == waited_before:  # a function may measure its own
            part.non_generation_time = usage["other_time_s"]
    _check_siblings(path, parts)
    for part in parts[1:]:
        part.usage = None  # the first sibling has it, so that sums over samples are right
    parts[0].usage = usage
    return cast(Execution, result)


def _complete(args: Any, path: str, sample: Sample) -> None:
    """Check what a user's function made of a sample, and set what it need not.

    Raises:
        DataError: its lists do not fit.
    """
    if "loss_masks" in vars(sample):
        raise DataError(f"{path} set sample.loss_masks, which nothing reads; it is loss_mask")
    sample.validate(vocab_size=GenerateState(args).vocab_size)
    if sample.status is Status.PENDING:
        sample.status = Status.COMPLETED
    if sample.status is Status.ABORTED and sample.remove_sample:
        # Not cut short by a full round: the function gave the sample up.
        error = DataError(f"{path} gave it up: status aborted and remove_sample")
        mark_failed(args, sample, "gave_up", error)
    if sample.status is Status.FAILED and sample.reward is None:
        sample.remove_sample = True


def _check_siblings(path: str, parts: Sequence[Sample]) -> None:
    """Nothing, if the samples of one execution say so.

    Raises:
        DataError: they have no common `rollout_id`.
    """
    ids = {part.rollout_id for part in parts}
    if len(parts) > 1 and (len(ids) > 1 or None in ids):
        raise DataError(
            f"{path} returned {len(parts)} samples with rollout_id {sorted(map(str, ids))}; those "
            "of one execution share a number, for instance the index of the sample they came from"
        )


async def _within_deadline(args: Any, path: str, call: Awaitable[Any]) -> Any:
    """What the user's function returns; a tool that hangs fails its sample, not the round.

    Raises:
        DeadlineExceeded: not done within --generate-timeout-s.
    """
    limit = asyncio.timeout(args.generate_timeout_s)
    deadline_s = args.generate_timeout_s or args.rollout_timeout_s
    warn_after_s = WARN_FRACTION * deadline_s  # turns and tools may well take minutes
    try:
        with waiting(path, "generate", deadline_s=deadline_s, warn_after_s=warn_after_s):
            async with limit:
                return await call
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(
            f"{path} was not done within {args.generate_timeout_s:g} s (--generate-timeout-s)"
        ) from error
