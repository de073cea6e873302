"""From prompt to reward: generate, sample hooks, reward; for one sample and for a group.

Functions of users run inside a fence here: what they raise fails their sample, not the run.
"""

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from types import NoneType
from typing import Any, cast

from slime.data.sample import Sample
from slime.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    EngineProtocolError,
    EngineUnavailable,
    RewardError,
    SlimeError,
)
from slime.observability.waits import subject
from slime.plugins import load_function
from slime.rollout.base_types import Execution, flatten
from slime.rollout.continuing import can_go_on, settle
from slime.rollout.custom_generate import custom_generate
from slime.rollout.failures import mark_failed
from slime.rollout.generate import can_share_request, generate, generate_group
from slime.rollout.loop import gather
from slime.rollout.rm_hub import REWARD_ERROR, async_rm, batched_async_rm
from slime.rollout.seeds import sampling_seed
from slime.rollout.state import GenerateState

Status = Sample.Status

# What would fail every sample alike passes the fence and stops the run.
FATAL = (ConfigError, CheckpointError)
_PLAIN = frozenset({NoneType, bool, int, float, str, Status})
_CONTAINERS = (list, dict)
_SESSION_BYTES = 16


async def generate_and_rm(
    args: Any,
    sample: Sample,
    sampling_params: Mapping[str, Any],
    evaluation: bool = False,
    *,
    stream: int | str | None = None,
) -> Execution:
    """`sample` answered and, unless --group-rm, rewarded; a list of siblings if it fanned out.

    A sample that is already answered (it waited in the buffer) is not generated again, and rewarded if it lacks
    one. After an
    abort nothing new is sent: the sample comes back ABORTED, with what it has.

    Args:
        stream: of the random numbers, see `sampling_seed`; by default the number of the round.
    """
    state = GenerateState(args)
    if sample.status not in (Status.PENDING, Status.ABORTED):
        if sample.reward is None:  # a checkpoint was written between its answer and its reward
            await _finish(args, sample, evaluation)
        return sample
    async with state.slots(1):
        if state.aborted:
            sample.status = Status.ABORTED
            return sample
        seed = None if sample.index is None else _seed(args, state, sample, stream)
        with subject(f"sample {sample.index}"):
            execution = await _generate_fenced(args, sample, sampling_params, seed, evaluation)
    parts = flatten([execution])
    await gather(_finish(args, part, evaluation) for part in parts)
    pack_samples(parts)
    return execution


async def generate_and_rm_group(
    args: Any,
    group: Sequence[Sample],
    sampling_params: Mapping[str, Any],
    evaluation: bool = False,
    *,
    stream: int | str | None = None,
) -> list[Execution]:
    """All executions of one group, in order, rewarded unless one of them was aborted.

    Args: as `generate_and_rm`.
    """
    _open_sessions(group)
    for sample in group:
        _mask_older_tokens(args, sample)
    if can_share_request(args, group, sampling_params):
        await _generate_together(args, group, sampling_params, stream)
        await gather(_finish(args, sample, evaluation) for sample in group)
        executions: list[Execution] = list(group)
    else:
        executions = await gather(
            generate_and_rm(args, sample, sampling_params, evaluation, stream=stream)
            for sample in group
        )
    if args.group_rm:
        await _reward_together(args, flatten(executions))
    pack_samples(flatten(executions))
    return executions


def is_unfinished(group: Sequence[Execution]) -> bool:
    """Whether an abort, ours or the engine's, cut a sample of the group short."""
    return any(sample.status in (Status.PENDING, Status.ABORTED) for sample in flatten(group))


def pack_samples(samples: Iterable[Sample]) -> None:
    """Keep the long lists of those that are answered as arrays, until somebody reads them."""
    for sample in samples:
        if _is_answered(sample):
            sample.pack()


def snapshot(sample: Sample) -> Sample:
    """A copy to go back to: it shares nothing with `sample` that generating changes."""
    twin = _shallow_copy(sample)
    own = vars(twin)
    for name in [name for name, value in own.items() if type(value) not in _PLAIN]:
        value = own[name]
        if type(value) in _CONTAINERS:
            own[name] = value.copy()
        elif isinstance(value, _CONTAINERS):  # a class of the user's
            own[name] = copy(cast(Any, value))
    twin.spec_info = _shallow_copy(sample.spec_info)
    twin.prefix_cache_info = _shallow_copy(sample.prefix_cache_info)
    return twin


def _shallow_copy[T](item: T) -> T:
    """As `copy.copy`, which asks how to pickle the object and takes longer."""
    twin = object.__new__(type(item))
    vars(twin).update(vars(item))
    return twin


def _open_sessions(group: Sequence[Sample]) -> None:
    """Give a random `session_id` to each sample that has none; one system call for all of them."""
    new = [sample for sample in group if not sample.session_id]
    digits = os.urandom(_SESSION_BYTES * len(new)).hex()
    for i, sample in enumerate(new):
        sample.session_id = digits[2 * _SESSION_BYTES * i : 2 * _SESSION_BYTES * (i + 1)]


def _mask_older_tokens(args: Any, sample: Sample) -> None:
    """--mask-offpolicy-in-partial-rollout: do not train on what an earlier round wrote."""
    if not (args.partial_rollout and args.mask_offpolicy_in_partial_rollout):
        return
    if sample.metadata.get("start_rollout_id") not in (None, GenerateState(args).rollout_id):
        sample.loss_mask = [0] * sample.response_length


def raise_if_all_failed(
    state: GenerateState, groups: Iterable[Sequence[Execution]], where: str
) -> None:
    """Nothing, if a sample of `groups` did not fail.

    Args:
        where: names the round in the message.

    Raises:
        EngineError, SlimeError: every sample failed; carries the first cause.
    """
    num_samples = 0
    for sample in (sample for group in groups for sample in flatten(group)):
        if sample.status is not Status.FAILED:
            return
        num_samples += 1
    cause = next(iter(state.failures.values()), None)
    kind = EngineError if isinstance(cause, EngineError) else SlimeError
    reason = repr(cause) if cause else "the generate function set Status.FAILED"
    raise kind(f"{where}: all {num_samples} samples failed; the first cause: {reason}") from cause


async def _generate_fenced(
    args: Any,
    sample: Sample,
    sampling_params: Mapping[str, Any],
    seed: int | None,
    evaluation: bool,
) -> Execution:
    path = sample.generate_function_path or args.custom_generate_function_path
    before, params = snapshot(sample), dict(sampling_params)
    try:
        if path is not None:
            return await custom_generate(args, path, sample, params, seed, evaluation)
        return await generate(
            args, sample, params if seed is None else params | {"sampling_seed": seed}
        )
    except FATAL:
        raise
    except Exception as error:  # noqa: BLE001 - the fence: mark_failed logs it
        # Whatever the function had half done to the sample would not pass `validate`.
        vars(sample).clear()
        vars(sample).update(vars(before))
        mark_failed(args, sample, _category(error, "generate"), error)
        return sample


async def _generate_together(
    args: Any, group: Sequence[Sample], params: Mapping[str, Any], stream: int | str | None
) -> None:
    state = GenerateState(args)
    seeds = [_seed(args, state, sample, stream) for sample in group]
    async with state.slots(len(group)):
        if state.aborted:
            for sample in group:
                sample.status = Status.ABORTED
            return
        try:
            with subject(f"group {group[0].group_index}"):
                await generate_group(args, group, params, seeds)
        except EngineError as error:
            for sample in group:
                if sample.status is Status.PENDING:
                    mark_failed(args, sample, _category(error, "engine"), error)
            return
        await _go_on(args, state, group, params, stream)


async def _go_on(
    args: Any,
    state: GenerateState,
    group: Sequence[Sample],
    params: Mapping[str, Any],
    stream: int | str | None,
) -> None:
    """Go on with the answers of a group that an engine cut short, each by itself."""
    cut = [sample for sample in group if sample.status is Status.ABORTED]
    if not cut or state.aborted or not can_go_on(params):
        return
    await settle()
    if state.aborted:
        return
    state.num_continued += len(cut)
    await gather(
        _generate_fenced(args, sample, params, _seed(args, state, sample, stream), evaluation=False)
        for sample in cut
    )


async def _finish(args: Any, sample: Sample, evaluation: bool) -> None:
    """Hooks, then the reward, for a sample that has just been answered."""
    if not _is_answered(sample):
        return
    try:
        await _run_hooks(args, sample, evaluation)
    except FATAL:
        raise
    except Exception as error:  # noqa: BLE001 - the fence: mark_failed logs it
        mark_failed(args, sample, "hook", error)
        return
    if _is_answered(sample) and sample.reward is None and not args.group_rm:
        with subject(f"sample {sample.index}"):
            sample.reward = await async_rm(args, sample)
        _check_rewarded(args, sample)


def _check_rewarded(args: Any, sample: Sample) -> None:
    """`async_rm` has its own fence and marks a sample it could not judge; complete the mark."""
    if sample.status is Status.FAILED:
        reason = sample.metadata.get(REWARD_ERROR, "marked by the reward function")
        mark_failed(args, sample, "reward", RewardError(f"sample {sample.index}: {reason}"))


async def _run_hooks(args: Any, sample: Sample, evaluation: bool) -> None:
    """Call each --rollout-sample-hook-path; a sample that a hook returns replaces the contents."""
    if not args.rollout_sample_hook_path:
        return
    rollout_id = GenerateState(args).rollout_id
    for path in args.rollout_sample_hook_path:
        result = load_function(path)(args, sample, rollout_id=rollout_id, evaluation=evaluation)
        if inspect.isawaitable(result):
            result = await result
        if result is None or result is sample:
            continue
        if not isinstance(result, Sample):
            raise DataError(f"{path} returned {result!r:.80}; a hook returns a Sample or None")
        # In place: the group already holds this object.
        vars(sample).update(vars(result))


async def _reward_together(args: Any, samples: list[Sample]) -> None:
    """Rewards by one call for the whole group; failed samples stand apart, aborted groups wait."""
    waiting = [sample for sample in samples if _is_answered(sample) and sample.reward is None]
    if not waiting or is_unfinished(samples):
        return
    rewards = await batched_async_rm(args, waiting)
    for sample, reward in zip(waiting, rewards, strict=True):
        sample.reward = reward
        _check_rewarded(args, sample)


def _is_answered(sample: Sample) -> bool:
    return sample.status not in (Status.PENDING, Status.ABORTED, Status.FAILED)


def _seed(args: Any, state: GenerateState, sample: Sample, stream: int | str | None) -> int:
    assert sample.index is not None
    source = stream if stream is not None else state.rollout_id
    return sampling_seed(
        args.rollout_seed, "" if source is None else source, sample.index, sample.response_length
    )


def _category(error: Exception, default: str) -> str:
    """Name under which `rollout/error_cat/` counts the error."""
    if isinstance(error, EngineUnavailable):
        return "engine_unavailable"
    if isinstance(error, EngineProtocolError):
        return "engine_protocol"
    if isinstance(error, TimeoutError):  # after EngineUnavailable, which tells more
        return "timeout"
    return "engine" if isinstance(error, EngineError) else default
