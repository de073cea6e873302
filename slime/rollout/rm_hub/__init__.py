"""Rewards: `async_rm` for one sample, `batched_async_rm` for a group, behind a fence.

A reward that raises, takes too long, or gives no finite number fails its sample, never the run.
"""

import asyncio
import copy
import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

from slime.data.sample import Sample, Status
from slime.errors import ConfigError, RewardError
from slime.observability.phases import Phase, side_by_side
from slime.observability.waits import waiting
from slime.plugins import load_function
from slime.registry import REWARDS, lookup
from slime.rollout.rm_hub.answers import last_boxed
from slime.rollout.rm_hub.base import BadReward, Reward, RewardFunction

logger = logging.getLogger(__name__)

REWARD_ERROR = "reward_error"
_BOXED = "boxed_"
_failures: Counter[str] = Counter()


async def async_rm(args: Any, sample: Sample, **kwargs: Any) -> Reward:
    """The reward of one sample: a finite number, or a dict as `--reward-key` expects it.

    The function is, in this order: `sample.custom_rm_path`, `args.custom_rm_path`,
    `sample.metadata["rm_type"]`, `args.rm_type`. With the prefix `boxed_` a built-in reward sees
    only the content of the last \\boxed{}. A user's function has `reward_timeout_s` seconds;
    built-in ones keep their own deadlines.

    When it fails, the reward is 0.0, `sample.status` becomes FAILED and
    `sample.metadata["reward_error"]` tells why: "timeout", "not_a_number", "missing_key",
    "missing_label" or "raised_<exception>".

    Args:
        args: flat namespace with custom_rm_path, rm_type, reward_key, reward_timeout_s, and what
            the function itself reads.
        kwargs: handed to a user's function.

    Raises:
        ConfigError: no reward is configured, there is none of that name, or it lacks a flag.
    """
    path = sample.custom_rm_path or args.custom_rm_path
    name = path or sample.metadata.get("rm_type") or args.rm_type
    user = load_function(path) if path else None
    call = _call_user(args, user, sample, **kwargs) if user else _built_in(name)(args, sample)
    value: Reward = 0.0
    with _fence([sample], name), _judging(args, name):
        value = _checked(args, await call)
    return value


async def batched_async_rm(args: Any, samples: Sequence[Sample], **kwargs: Any) -> list[Reward]:
    """One reward per sample of a group, in order; fails like `async_rm`.

    `--custom-rm-path` is called once with the list of samples and returns a list. Built-in rewards,
    and samples with a path of their own, are asked one by one, all at the same time.
    """
    path = args.custom_rm_path
    if not path or any(sample.custom_rm_path not in (None, path) for sample in samples):
        return await _one_by_one(args, samples, **kwargs)
    values: list[Any] = []
    with _fence(samples, path):
        with _judging(args, path):
            values = list(await _call_user(args, load_function(path), list(samples), **kwargs))
        if len(values) != len(samples):
            raise RewardError(f"expected {len(samples)} rewards in a list, found {values!r:.200}")
    if any(REWARD_ERROR in sample.metadata for sample in samples):
        return [0.0] * len(samples)
    rewards: list[Reward] = [0.0] * len(samples)
    for i, sample in enumerate(samples):
        with _fence([sample], path):
            rewards[i] = _checked(args, values[i])
    return rewards


@contextmanager
def _judging(args: Any, name: Any) -> Generator[None]:
    """The wait for a reward; late after half its deadline."""
    deadline_s = args.reward_timeout_s
    wait = waiting(f"reward {name}", "judge", deadline_s=deadline_s, warn_after_s=deadline_s / 2)
    with wait, side_by_side(Phase.REWARD):
        yield


async def _one_by_one(args: Any, samples: Sequence[Sample], **kwargs: Any) -> list[Reward]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(async_rm(args, item, **kwargs)) for item in samples]
    except* ConfigError as errors:
        raise errors.exceptions[0] from None  # one is enough, and no group to unpack
    return [task.result() for task in tasks]


def _built_in(name: str | None) -> RewardFunction:
    """The reward called `name`, which may begin with `boxed_`."""
    if not name:
        raise ConfigError(
            f"no reward: set --rm-type (one of {', '.join(REWARDS)}) or --custom-rm-path, or give "
            'each row {"metadata": {"rm_type": ...}}'
        )
    function = cast(RewardFunction, lookup(REWARDS, name.removeprefix(_BOXED)))
    return _of_boxed(function) if name.startswith(_BOXED) else function


def _of_boxed(function: RewardFunction) -> RewardFunction:
    async def reward(args: Any, sample: Sample) -> Reward:
        view = copy.copy(sample)
        view.response = last_boxed(sample.response) or ""
        return await function(args, view)

    return reward


async def _call_user(args: Any, function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
    """What the user's function returns; a plain function runs in a thread.

    A thread cannot be ended: after a timeout it runs on, but nobody waits for it.
    """
    if inspect.iscoroutinefunction(function):
        return await _within(args.reward_timeout_s, function(args, *inputs, **kwargs))
    async with asyncio.timeout(args.reward_timeout_s):
        result = await asyncio.to_thread(function, args, *inputs, **kwargs)
        return await result if inspect.isawaitable(result) else result


async def _within[T](timeout_s: float, call: Coroutine[Any, Any, T]) -> T:
    """The result of `call`; the clock runs from now on, but one that never waits needs no alarm.

    Raises:
        TimeoutError: it was not done in time and was cancelled.
    """
    running = asyncio.get_running_loop()
    deadline = running.time() + timeout_s
    task = asyncio.Task(call, loop=running, eager_start=True)
    if task.done():
        return task.result()
    async with asyncio.timeout_at(deadline):
        return await task


def _checked(args: Any, value: Any) -> Reward:
    """`value` as a finite number, or as the dict it is.

    Raises:
        BadReward: it is neither, or its entry `reward_key` is no finite number.
    """
    if not isinstance(value, dict):
        return _finite(value)
    scores = cast(dict[str, Any], value)
    if args.reward_key is None:
        return scores
    if args.reward_key not in scores:
        raise BadReward(
            "missing_key", f"--reward-key {args.reward_key}: the reward has {sorted(scores)}"
        )
    return scores | {args.reward_key: _finite(scores[args.reward_key])}


def _finite(value: Any) -> float:
    if value is None or isinstance(value, (str, bytes)):
        raise BadReward("not_a_number", f"the reward is {value!r:.80}")
    number = float(value)  # also arrays and tensors with one element
    if not math.isfinite(number):
        raise BadReward("not_a_number", f"the reward is {number}")
    return number


class _fence:
    """Keep what goes wrong inside from the run: mark the samples, log, and go on after the block.

    A ConfigError passes: it would fail every sample alike. So does cancellation.
    A class with a function's name: a generator would take three times as long.
    """

    __slots__ = ("name", "samples")

    def __init__(self, samples: Sequence[Sample], name: Any) -> None:
        self.samples = samples
        self.name = name

    def __enter__(self) -> None:
        for sample in self.samples:
            sample.metadata.pop(REWARD_ERROR, None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, ConfigError):
            return False
        reason = _reason(error)
        for sample in self.samples:
            sample.status = Status.FAILED
            sample.metadata[REWARD_ERROR] = reason
        _log(reason, self.name, self.samples, error)
        return True


def _log(reason: str, name: Any, samples: Sequence[Sample], error: Exception) -> None:
    """Tell of the 1st, 10th, 100th ... failure of a kind: a broken reward must not fill the log."""
    _failures[reason] += 1
    if str(_failures[reason]).strip("0") == "1":
        logger.error(
            "reward %s failed for sample %s: %s (%d so far); the reward is 0",
            name,
            [sample.index for sample in samples],
            reason,
            _failures[reason],
            exc_info=error,
        )


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, BadReward):
        return error.reason
    return f"raised_{type(error).__name__}"
