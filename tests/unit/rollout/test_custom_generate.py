import copy
from typing import Any

import pytest
from support.fake_engine import fake_engine
from support.rollout_world import FakeDataSource, make_args

from slime.data.sample import Sample
from slime.errors import DataError
from slime.rollout.custom_generate import custom_generate
from slime.rollout.groups import generate_and_rm_group, is_unfinished
from slime.rollout.sglang_rollout import generate
from slime.rollout.state import GenerateState
from slime.utils.http_utils import post

Status = Sample.Status
HERE = "unit.rollout.test_custom_generate"


async def gives_up(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    sample.status, sample.remove_sample = Status.ABORTED, True
    return sample


async def old_name(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    sample = await generate(args, sample, sampling_params)
    sample.loss_masks = [1] * sample.response_length  # type: ignore[attr-defined]
    return sample


async def shares_everything(
    args: Any, sample: Sample, sampling_params: dict[str, Any]
) -> list[Sample]:
    sample = await generate(args, sample, sampling_params)
    sample.rollout_id = sample.index
    return [sample, copy.copy(sample)]


async def measures_itself(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    sample = await generate(args, sample, sampling_params)
    sample.non_generation_time = 7.0
    return sample


async def asks_a_judge(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    payload = {"input_ids": [1], "sampling_params": {}}
    await post(f"{sample.metadata['judge']}/generate", payload)
    return await generate(args, sample, sampling_params)


async def run(args: Any, name: str, **fields: Any) -> Any:
    sample = FakeDataSource(args).get_samples(1)[0][0]
    vars(sample).update(fields)
    state = GenerateState(args)
    state.start_round(0)
    params = dict(state.sampling_params)
    return await custom_generate(args, f"{HERE}.{name}", sample, params, 5, False)


async def test_sample_given_up_is_failed_and_its_group_finished():
    async with fake_engine() as engine:
        args = make_args(engine.url, custom_generate_function_path=f"{HERE}.gives_up")
        group = FakeDataSource(args).get_samples(1)[0]
        GenerateState(args).start_round(0)
        done = await generate_and_rm_group(args, group, {})
    assert not is_unfinished(done)
    assert [sample.status for sample in group] == [Status.FAILED] * 2
    assert {sample.metadata["error_cat"] for sample in group} == {"gave_up"}
    assert group[0].remove_sample


async def test_field_of_early_versions_is_named():
    async with fake_engine() as engine:
        with pytest.raises(DataError, match="it is loss_mask"):
            await run(make_args(engine.url), "old_name")


async def test_first_sibling_has_the_usage_of_the_execution():
    async with fake_engine() as engine:
        first, second = await run(make_args(engine.url), "shares_everything")
    assert first.usage["requests"] == 1
    assert first.usage["tokens_in"] == 2
    assert first.usage["tokens_out"] == 4
    assert second.usage is None
    assert second.non_generation_time == first.non_generation_time == first.usage["other_time_s"]


async def test_usage_goes_on_where_a_resumed_sample_left_it():
    before = {"requests": 2, "tokens_in": 10, "tokens_out": 5, "other_time_s": 1.0}
    async with fake_engine() as engine:
        sample = await run(
            make_args(engine.url), "measures_itself", usage=before, non_generation_time=1.0
        )
    assert sample.usage["requests"] == 3
    assert sample.usage["tokens_in"] == 12
    assert sample.non_generation_time == 7.0


async def test_requests_to_others_are_neither_counted_nor_seeded():
    async with fake_engine() as engine, fake_engine() as judge:
        sample = await run(make_args(engine.url), "asks_a_judge", metadata={"judge": judge.url})
    assert judge.requests == [{"input_ids": [1], "sampling_params": {}}]
    assert sample.usage["requests"] == 1
    assert "sampling_seed" in engine.requests[0]["sampling_params"]
