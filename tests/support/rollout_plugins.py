"""Functions of users, as rollout tests name them by dotted path."""

import asyncio
from copy import deepcopy
from typing import Any

from slime.data.sample import Sample
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import generate


async def constant_reward(args: Any, sample: Sample) -> float:
    return 1.0


async def index_reward(args: Any, sample: Sample) -> float:
    assert sample.index is not None
    return float(sample.index % 2)


async def failing_reward(args: Any, sample: Sample) -> float:
    raise ValueError("no judge today")


async def reward_fails_for_index_0(args: Any, sample: Sample) -> float:
    if sample.index == 0:
        raise ValueError("no judge for this one")
    return 1.0


async def group_reward(args: Any, samples: list[Sample]) -> list[float]:
    return [float(i) for i in range(len(samples))]


def keep_odd_prompts(args: Any, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    return DynamicFilterOutput(keep=bool((samples[0].group_index or 0) % 2), reason="even")


def keep_odd_prompts_or_any(args: Any, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    verdict = keep_odd_prompts(args, samples)
    return DynamicFilterOutput(verdict.keep, verdict.reason, keep_when_insufficient=True)


def keep_as_bool(args: Any, samples: list[Sample]) -> bool:
    return (samples[0].group_index or 0) > 0


async def two_turns(
    args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample:
    sample.metadata["evaluation"] = evaluation
    sample = await generate(args, sample, sampling_params)
    sample.append_response_tokens(args, tokens=[9, 9], trainable=False, text="tool")
    return await generate(args, sample, sampling_params)


async def hangs_for_index_0(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    if sample.index == 0:
        await asyncio.Event().wait()  # a tool that never answers
    return await generate(args, sample, sampling_params)


async def fan_out(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> list[Sample]:
    sample = await generate(args, sample, sampling_params)
    sample.rollout_id = sample.index
    return [sample, deepcopy(sample)]


async def fan_out_without_id(
    args: Any, sample: Sample, sampling_params: dict[str, Any]
) -> list[Sample]:
    sample = await generate(args, sample, sampling_params)
    return [sample, deepcopy(sample)]


async def breaks_half_way(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    if sample.index == 0:
        sample.tokens += [1, 2, 3]
        sample.response_length = 7
        raise KeyError("tool")
    return await generate(args, sample, sampling_params)


async def never_returns(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    if sample.group_index == 0:
        return await generate(args, sample, sampling_params)
    await asyncio.Event().wait()
    raise AssertionError


def note_round(
    args: Any, sample: Sample, *, rollout_id: int | None = None, evaluation: bool = False
) -> None:
    assert sample.reward is None
    sample.metadata["hook"] = (rollout_id, evaluation)


async def replace_label(
    args: Any, sample: Sample, *, rollout_id: int | None = None, evaluation: bool = False
) -> Sample:
    other = deepcopy(sample)
    other.label = "replaced"
    return other


def failing_hook(
    args: Any, sample: Sample, *, rollout_id: int | None = None, evaluation: bool = False
) -> None:
    if sample.index == 0:
        raise RuntimeError("hook broke")


def remove_first_sample(args: Any, data: list[list[Sample]]) -> None:
    data[0][0].remove_sample = True


def note_all_samples(args: Any, all_samples: list[list[Sample]], data_source: Any) -> None:
    data_source.seen_groups = [group[0].group_index for group in all_samples]
