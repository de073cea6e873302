import asyncio
import logging
import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slime.data.sample import Sample, Status
from slime.errors import ConfigError
from slime.rollout.rm_hub import REWARD_ERROR, async_rm, batched_async_rm


def args(**changes: Any) -> SimpleNamespace:
    values = {
        "custom_rm_path": None,
        "rm_type": None,
        "rm_url": None,
        "reward_key": None,
        "label_key": "label",
        "reward_timeout_s": 30.0,
        "reward_workers": 1,
        "rollout_seed": 42,
    }
    return SimpleNamespace(**values | changes)


def custom(name: str, **changes: Any) -> SimpleNamespace:
    return args(custom_rm_path=f"support.custom_rewards.{name}", **changes)


def done(response: str = "", **values: Any) -> Sample:
    return Sample(response=response, status=Status.COMPLETED, **values)


async def test_the_reward_of_the_sample_goes_before_that_of_the_run() -> None:
    sample = done("abc", label="abc", metadata={"rm_type": "exact_match"})
    assert await async_rm(args(rm_type="random"), sample) == 1.0
    assert await async_rm(custom("plain"), sample) == 0.25
    sample.custom_rm_path = "support.custom_rewards.length"
    assert await async_rm(custom("plain"), sample) == 3.0
    assert sample.status is Status.COMPLETED


async def test_boxed_looks_only_into_the_box() -> None:
    sample = done(r"it is \boxed{blue}", label="blue")
    assert await async_rm(args(rm_type="exact_match"), sample) == 0.0
    assert await async_rm(args(rm_type="boxed_exact_match"), sample) == 1.0
    assert await async_rm(args(rm_type="boxed_exact_match"), done("blue", label="blue")) == 0.0
    assert sample.response == r"it is \boxed{blue}"


async def test_keywords_reach_the_function() -> None:
    assert await async_rm(custom("with_keywords"), done(), bonus=0.5) == 1.5


@pytest.mark.parametrize(
    ("value", "expected"), [(1, 1.0), (True, 1.0), (np.float32(0.5), 0.5), (np.array(2.0), 2.0)]
)
async def test_whatever_is_one_number_counts(value: Any, expected: float) -> None:
    result = await async_rm(custom("as_told"), done(metadata={"told": value}))
    assert result == expected
    assert type(result) is float


@pytest.mark.parametrize(
    ("name", "told", "reason"),
    [
        ("raises", None, "raised_KeyError"),
        ("as_told", None, "not_a_number"),
        ("as_told", "1.0", "not_a_number"),
        ("as_told", math.nan, "not_a_number"),
        ("as_told", math.inf, "not_a_number"),
        ("as_told", [1.0, 2.0], "raised_TypeError"),
        ("as_told", {"acc": 1.0}, "missing_key"),
        ("as_told", {"score": None}, "not_a_number"),
    ],
)
async def test_a_bad_reward_fails_its_sample_only(name: str, told: Any, reason: str) -> None:
    sample = done(metadata={"told": told})
    assert await async_rm(custom(name, reward_key="score"), sample) == 0.0
    assert sample.status is Status.FAILED
    assert sample.metadata[REWARD_ERROR] == reason


async def test_a_failure_is_logged_at_its_first_tenth_and_hundredth_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slime.rollout import rm_hub

    monkeypatch.setattr(rm_hub, "_failures", rm_hub.Counter())
    with caplog.at_level(logging.ERROR):
        for index in range(100):
            await async_rm(custom("raises"), done(index=index))
    assert [record.args[3] for record in caplog.records if record.args] == [1, 10, 100]  # type: ignore[index]
    assert "KeyError: 'judge'" in caplog.text


@pytest.mark.parametrize("name", ["hangs", "hangs_plainly"])
async def test_a_reward_that_hangs_is_given_up_at_its_deadline(name: str) -> None:
    sample, start = done(), time.monotonic()
    assert await async_rm(custom(name, reward_timeout_s=0.1), sample) == 0.0
    assert time.monotonic() - start < 0.45
    assert sample.metadata[REWARD_ERROR] == "timeout"


async def test_cancelling_reaches_the_reward() -> None:
    sample = done()
    task = asyncio.create_task(async_rm(custom("hangs"), sample))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sample.status is Status.COMPLETED


async def test_a_second_try_clears_the_error() -> None:
    sample = done("abc", metadata={REWARD_ERROR: "timeout"})
    assert await async_rm(custom("length"), sample) == 3.0
    assert REWARD_ERROR not in sample.metadata


async def test_what_would_fail_every_sample_stops_the_run() -> None:
    with pytest.raises(ConfigError, match="--rm-type"):
        await async_rm(args(), done())
    with pytest.raises(ConfigError, match="did you mean 'math'"):
        await async_rm(args(rm_type="maths"), done())
    with pytest.raises(ConfigError, match="--rm-url"):
        await async_rm(args(rm_type="remote_rm"), done())
    with pytest.raises(ConfigError, match="--label-key"):
        await batched_async_rm(args(rm_type="exact_match", label_key=None), [done(), done()])


async def test_a_custom_reward_gets_one_sample_or_the_whole_group() -> None:
    group = [done("a"), done("bbb")]
    function = custom("length_or_lengths")
    assert await async_rm(function, group[1]) == 3.0
    assert await batched_async_rm(function, group) == [0.5, 1.5]


async def test_a_group_with_a_reward_of_its_own_is_asked_one_by_one() -> None:
    group = [done("a"), done("bbb", custom_rm_path="support.custom_rewards.plain")]
    assert await batched_async_rm(custom("length"), group) == [1.0, 0.25]


async def test_built_in_rewards_of_a_group_are_asked_one_by_one() -> None:
    group = [done("a", label="a"), done("b", label="a")]
    assert await batched_async_rm(args(rm_type="exact_match"), group) == [1.0, 0.0]


async def test_one_bad_reward_of_a_group_fails_one_sample() -> None:
    group = [done(metadata={"told": 1.0}), done(metadata={"told": None})]
    assert await batched_async_rm(custom("all_as_told"), group) == [1.0, 0.0]
    assert [sample.status for sample in group] == [Status.COMPLETED, Status.FAILED]


@pytest.mark.parametrize("name", ["too_few", "raises", "length"])
async def test_a_group_reward_that_fails_as_a_whole_fails_the_group(name: str) -> None:
    group = [done(), done()]
    assert await batched_async_rm(custom(name), group) == [0.0, 0.0]
    assert all(sample.status is Status.FAILED for sample in group)


async def test_the_deadline_counts_what_a_reward_did_before_it_first_waited() -> None:
    sample = done()
    started = time.monotonic()
    await async_rm(custom("busy_then_waits", reward_timeout_s=0.05), sample)
    assert sample.metadata[REWARD_ERROR] == "timeout"
    assert time.monotonic() - started < 2.0
