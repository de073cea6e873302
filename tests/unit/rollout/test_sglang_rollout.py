import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import FakeEngine, Payload, Reply, fake_engine
from support.rollout_world import FakeDataSource, make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.data.sample import Sample
from slime.errors import ConfigError, DataError, DeadlineExceeded, EngineError, SlimeError
from slime.rollout import continuing, loop, sglang_rollout
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, flatten
from slime.rollout.seeds import sampling_seed
from slime.rollout.sglang_rollout import generate_rollout, generate_rollout_async

Status = Sample.Status
PLUGINS = "support.rollout_plugins"


def prompt_of(payload: Payload) -> int:
    return payload["input_ids"][0] - 5


def holding(*prompts: int) -> Callable[[Payload, int], Reply]:
    """Requests for these prompts wait for the abort, with two tokens ready."""
    return lambda payload, number: Reply(ids=(50, 51), hold=prompt_of(payload) in prompts)


def group_indexes(groups: Any) -> list[int | None]:
    return [flatten(group)[0].group_index for group in groups]


async def test_round_returns_complete_groups_with_rewards():
    async with fake_engine() as engine:
        args = make_args(engine.url)
        source = FakeDataSource(args)
        output = await generate_rollout_async(args, 0, source)
    assert group_indexes(output.samples) == [0, 1]
    assert all(s.status is Status.COMPLETED for g in output.samples for s in flatten(g))
    assert output.metrics is not None
    assert output.metrics["rollout/aborted_groups"] == 0
    assert output.metrics["perf/request/e2e_latency/mean"] == 0.25
    assert (source.asked, source.buffer, engine.num_aborts) == ([2], [], 0)


async def test_groups_come_in_the_order_of_prompts_not_of_completion():
    engine_box: list[FakeEngine] = []

    def on_generate(payload: Payload, number: int) -> Reply:
        if prompt_of(payload) == 0:
            return Reply(hold=True)
        if number == 7:  # the last of the others has arrived
            asyncio.get_running_loop().call_soon(engine_box[0].release)
        return Reply()

    async with fake_engine(on_generate) as engine:
        engine_box.append(engine)
        args = make_args(engine.url, rollout_batch_size=4)
        output = await generate_rollout_async(args, 0, FakeDataSource(args))
    assert group_indexes(output.samples) == [0, 1, 2, 3]


async def test_every_sample_of_every_round_has_another_seed():
    async with fake_engine() as engine:
        args = make_args(engine.url)
        source = FakeDataSource(args)
        for rollout_id in range(3):
            await generate_rollout_async(args, rollout_id, source)
    seeds = [request["sampling_params"]["sampling_seed"] for request in engine.requests]
    assert len(set(seeds)) == len(seeds) == 12
    assert sampling_seed(42, 1, 4) in seeds


async def test_over_sampling_aborts_the_rest_and_loses_no_prompt():
    async with fake_engine(holding(1, 3)) as engine:
        args = make_args(engine.url, over_sampling_batch_size=4)
        source = FakeDataSource(args)
        output = await generate_rollout_async(args, 0, source)
        assert engine.held == 0
    assert source.asked == [4]
    assert group_indexes(output.samples) == [0, 2]
    assert engine.num_aborts >= 1
    assert output.metrics is not None
    assert output.metrics["rollout/aborted_groups"] == 2
    # Fresh prompts, as if they had never been asked.
    assert source.buffer == [FakeDataSource(args).get_samples(4)[i] for i in (1, 3)]


async def test_abort_reaches_every_engine_not_the_router():
    async with fake_engine(holding(1)) as router, fake_engine() as other:
        args = make_args(router.url, over_sampling_batch_size=2, rollout_batch_size=1)
        args.engine_urls = [router.url, other.url, "http://127.0.0.1:9"]
        await generate_rollout_async(args, 0, FakeDataSource(args))
    assert router.num_aborts == other.num_aborts >= 1


async def test_partial_rollout_resumes_where_it_stopped(tmp_path: Path):
    async with fake_engine(holding(1)) as engine:
        args = make_args(
            engine.url,
            rollout_batch_size=1,
            over_sampling_batch_size=2,
            partial_rollout=True,
            mask_offpolicy_in_partial_rollout=True,
            hf_checkpoint=make_char_tokenizer(tmp_path),
        )
        source = FakeDataSource(args)
        await generate_rollout_async(args, 0, source)
        (group,) = source.buffer
        assert [s.tokens for s in group] == [[6, 6, 50, 51]] * 2
        assert {s.status for s in group} == {Status.ABORTED}
        assert {s.metadata["start_rollout_id"] for s in group} == {0}

        engine.on_generate = lambda payload, number: Reply(ids=(60,))
        engine.weight_version = "1"
        args.over_sampling_batch_size = 1
        output = await generate_rollout_async(args, 1, source)
    sample = flatten(output.samples[0])[0]
    resumed = engine.requests[-1]
    assert resumed["input_ids"] == [6, 6, 50, 51]
    assert resumed["sampling_params"]["max_new_tokens"] == 14
    assert resumed["sampling_params"]["sampling_seed"] in {
        sampling_seed(42, 1, index, 2) for index in (2, 3)
    }
    assert (sample.group_index, sample.tokens) == (1, [6, 6, 50, 51, 60])
    assert sample.loss_mask == [0, 0, 1]
    assert sample.weight_versions == ["0", "1"]
    assert sample.version_spans == [(0, "0"), (2, "1")]
    assert source.buffer == []


async def test_partial_rollout_keeps_surplus_answers():
    async with fake_engine(holding(2)) as engine:
        args = make_args(
            engine.url, rollout_batch_size=1, over_sampling_batch_size=3, partial_rollout=True
        )
        source = FakeDataSource(args)
        answered = source.get_samples(2)
        for sample in answered[0] + answered[1]:
            sample.append_response_tokens(args, tokens=[50], log_probs=[-0.5])
            sample.status, sample.reward = Status.COMPLETED, 1.0
        source.add_samples(answered)
        output = await generate_rollout_async(args, 0, source)
        surplus, aborted = source.buffer
    assert output.samples == [answered[0]]
    assert surplus is not answered[1]
    assert surplus == answered[1]
    assert [s.metadata["start_rollout_id"] for s in surplus] == [0, 0]
    assert {s.status for s in aborted} <= {Status.ABORTED, Status.PENDING}


async def test_cancelled_or_fanned_out_groups_start_afresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sglang_rollout, "ABORT_TIMEOUT_S", 0.05)
    async with fake_engine() as engine:
        args = make_args(
            engine.url,
            rollout_batch_size=1,
            over_sampling_batch_size=2,
            partial_rollout=True,
            custom_generate_function_path=f"{PLUGINS}.never_returns",
        )
        source = FakeDataSource(args)
        await generate_rollout_async(args, 0, source)
        assert source.buffer == [FakeDataSource(args).get_samples(2)[1]]


async def test_filter_drops_groups_and_asks_for_more():
    async with fake_engine() as engine:
        args = make_args(engine.url, dynamic_sampling_filter_path=f"{PLUGINS}.keep_odd_prompts")
        source = FakeDataSource(args)
        output = await generate_rollout_async(args, 0, source)
    indexes = group_indexes(output.samples)
    assert len(indexes) == 2
    assert all(index is not None and index % 2 for index in indexes)
    assert output.metrics is not None
    assert output.metrics["rollout/dynamic_filter/drop_even"] >= 2
    assert source.asked[0] == 2
    assert len(source.asked) >= 2


async def test_filter_may_answer_with_a_bool():
    async with fake_engine() as engine:
        args = make_args(engine.url, dynamic_sampling_filter_path=f"{PLUGINS}.keep_as_bool")
        output = await generate_rollout_async(args, 0, FakeDataSource(args))
    assert 0 not in group_indexes(output.samples)
    assert output.metrics is not None
    assert output.metrics["rollout/dynamic_filter/drop_filter"] == 1


async def test_reserve_fills_the_batch_instead_of_another_round():
    async with fake_engine() as engine:
        args = make_args(
            engine.url,
            over_sampling_batch_size=3,
            dynamic_sampling_filter_path=f"{PLUGINS}.keep_odd_prompts_or_any",
        )
        source = FakeDataSource(args)
        output = await generate_rollout_async(args, 0, source)
    assert source.asked == [3]
    assert 1 in group_indexes(output.samples)
    assert output.metrics is not None
    assert output.metrics.get("rollout/dynamic_filter/drop_even", 0) <= 1


async def test_filters_of_the_whole_round_see_their_data():
    async with fake_engine() as engine:
        args = make_args(
            engine.url,
            rollout_sample_filter_path=f"{PLUGINS}.remove_first_sample",
            rollout_all_samples_process_path=f"{PLUGINS}.note_all_samples",
            dynamic_sampling_filter_path=f"{PLUGINS}.keep_odd_prompts",
        )
        source: Any = FakeDataSource(args)
        output = await generate_rollout_async(args, 0, source)
    assert [s.remove_sample for s in flatten(output.samples[0])] == [True, False]
    assert {0, 1, 3} <= set(source.seen_groups)
    assert source.seen_groups == sorted(source.seen_groups)


async def test_one_failed_request_costs_one_sample():
    async with fake_engine(
        lambda payload, number: Reply(status=500 if number == 0 else 200)
    ) as engine:
        args = make_args(engine.url)
        output = await generate_rollout_async(args, 0, FakeDataSource(args))
    statuses = [s.status for g in output.samples for s in flatten(g)]
    assert statuses.count(Status.FAILED) == 1
    assert statuses.count(Status.COMPLETED) == 3


@pytest.mark.parametrize("path", [None, f"{PLUGINS}.keep_odd_prompts"])
async def test_round_of_failures_stops_with_the_cause(path: str | None):
    async with fake_engine(lambda payload, number: Reply(status=500)) as engine:
        args = make_args(engine.url, dynamic_sampling_filter_path=path)
        with pytest.raises(EngineError, match=r"rollout 7: all \d+ samples failed.*status 500"):
            await generate_rollout_async(args, 7, FakeDataSource(args))


async def test_failing_reward_stops_with_the_cause():
    async with fake_engine() as engine:
        args = make_args(engine.url, custom_rm_path=f"{PLUGINS}.failing_reward")
        with pytest.raises(SlimeError, match="raised_ValueError"):
            await generate_rollout_async(args, 0, FakeDataSource(args))


async def test_deadline_names_what_is_missing_and_leaves_no_task():
    async with fake_engine(holding(1)) as engine:
        args = make_args(engine.url, rollout_timeout_s=0.2)
        with pytest.raises(DeadlineExceeded) as caught:
            await generate_rollout_async(args, 0, FakeDataSource(args))
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not [task for task in others if task.get_name() == "rollout 0"]
    message = str(caught.value)
    assert "within 0.2 s (--rollout-timeout-s): 1 of 2 groups accepted" in message
    assert "1 unfinished" in message
    assert engine.url in message


async def test_engine_that_aborts_on_its_own_cannot_starve_the_round(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(continuing, "MAX_EMPTY_CUTS", 0)
    async with fake_engine(lambda payload, number: Reply(ids=(), finish="abort")) as engine:
        args = make_args(engine.url)
        with pytest.raises(EngineError, match="does something else send /abort_request"):
            await generate_rollout_async(args, 0, FakeDataSource(args))


async def test_data_source_that_runs_dry_is_an_error():
    async with fake_engine() as engine:
        args = make_args(engine.url)
        with pytest.raises(DataError, match="gave no group when asked for 2; 0 of 2"):
            await generate_rollout_async(args, 0, FakeDataSource(args, num_groups=1))


async def test_source_without_buffer_is_tolerated_unless_partial(
    caplog: pytest.LogCaptureFixture,
):
    class ReadOnly(FakeDataSource):
        def add_samples(self, samples: list[list[Sample]]) -> None:
            raise ConfigError("no buffer")

    async with fake_engine(holding(1)) as engine:
        args = make_args(engine.url, rollout_batch_size=1, over_sampling_batch_size=2)
        await generate_rollout_async(args, 0, ReadOnly(args))
        assert "the prompts of 1 groups are lost: no buffer" in caplog.text
        args.partial_rollout = True
        with pytest.raises(ConfigError):
            await generate_rollout_async(args, 0, ReadOnly(args))


async def test_facade_runs_rounds_on_the_loop_of_the_process():
    engine = FakeEngine()

    def work() -> Any:
        loop.run(engine.start())
        args = make_args(engine.url)
        output = generate_rollout(args, 0, FakeDataSource(args))
        with pytest.raises(ConfigError, match="nothing to evaluate"):
            generate_rollout(args, 0, FakeDataSource(args), evaluation=True)
        loop.run(engine.stop())
        loop.shutdown()
        return output

    output = await asyncio.to_thread(work)
    assert isinstance(output, RolloutFnTrainOutput)
    assert not isinstance(output, RolloutFnEvalOutput)
