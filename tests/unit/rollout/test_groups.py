import logging
from typing import Any

import pytest
from support.fake_engine import Reply, fake_engine, seeded_ids
from support.rollout_world import FakeDataSource, make_args

from slime.data.sample import Sample
from slime.errors import ConfigError, EngineError, SlimeError
from slime.rollout.base_types import flatten
from slime.rollout.groups import (
    generate_and_rm,
    generate_and_rm_group,
    is_unfinished,
    raise_if_all_failed,
    snapshot,
)
from slime.rollout.seeds import sampling_seed
from slime.rollout.state import GenerateState

Status = Sample.Status
PLUGINS = "support.rollout_plugins"


async def run_group(args: Any, rollout_id: int = 3, **kwargs: Any) -> list[Any]:
    state = GenerateState(args)
    state.start_round(rollout_id)
    group = FakeDataSource(args).get_samples(1)[0]
    return await generate_and_rm_group(args, group, state.sampling_params, **kwargs)


async def test_each_sample_has_its_own_seed_and_its_reward():
    async with fake_engine() as engine:
        args = make_args(engine.url, custom_rm_path=f"{PLUGINS}.index_reward")
        group = await run_group(args)
    seeds = [sampling_seed(42, 3, index) for index in (0, 1)]
    asked = [request["sampling_params"]["sampling_seed"] for request in engine.requests]
    assert sorted(asked) == sorted(seeds)
    assert [tuple(sample.tokens[2:]) for sample in group] == [seeded_ids(seed) for seed in seeds]
    assert [sample.reward for sample in group] == [0.0, 1.0]
    assert len({sample.session_id for sample in group}) == 2
    assert not is_unfinished(group)


async def test_group_request_gives_the_samples_what_they_would_get_alone():
    async with fake_engine() as engine:
        alone = await run_group(make_args(engine.url))
        together = await run_group(make_args(engine.url, engine_supports_group_seeds=True))
    assert len(engine.requests) == 3
    assert [s.tokens for s in together] == [s.tokens for s in alone]
    assert [s.reward for s in together] == [1.0, 1.0]


async def test_evaluation_can_name_the_stream_of_its_seeds():
    async with fake_engine() as engine:
        await run_group(make_args(engine.url), evaluation=True, stream="eval/x")
    asked = {request["sampling_params"]["sampling_seed"] for request in engine.requests}
    assert asked == {sampling_seed(42, "eval/x", index) for index in (0, 1)}


async def test_finished_sample_is_not_generated_again():
    async with fake_engine() as engine:
        args = make_args(engine.url)
        sample = Sample(index=0, tokens=[1, 2], response_length=1, status=Status.COMPLETED)
        sample.reward = 0.5
        assert await generate_and_rm(args, sample, {}) is sample
    assert not engine.requests


async def test_after_an_abort_nothing_is_sent():
    for supports in (False, True):
        async with fake_engine() as engine:
            args = make_args(engine.url, engine_supports_group_seeds=supports)
            state = GenerateState(args)
            state.start_round(0)
            state.aborted = True
            group = FakeDataSource(args).get_samples(1)[0]
            done = await generate_and_rm_group(args, group, state.sampling_params)
        assert is_unfinished(done)
        assert {sample.reward for sample in flatten(done)} == {None}
        assert not engine.requests


# --- functions of users ---


async def test_custom_generate_gets_evaluation_only_if_it_declares_it():
    async with fake_engine() as engine:
        args = make_args(engine.url, custom_generate_function_path=f"{PLUGINS}.two_turns")
        group = await run_group(args, evaluation=True)
        args = make_args(engine.url, custom_generate_function_path=f"{PLUGINS}.fan_out")
        await run_group(args, evaluation=True)
    sample = group[0]
    assert sample.metadata["evaluation"] is True
    assert sample.loss_mask == [1] * 4 + [0] * 2 + [1] * 4
    assert sample.rollout_log_probs[4:6] == [0.0, 0.0]
    assert sample.weight_versions == ["0", "0"]


async def test_turns_of_a_custom_function_draw_their_own_random_numbers():
    async with fake_engine() as engine:
        args = make_args(engine.url, custom_generate_function_path=f"{PLUGINS}.two_turns")
        first = await run_group(args)
        again = await run_group(args)
    asked = [request["sampling_params"]["sampling_seed"] for request in engine.requests]
    assert len(set(asked[:4])) == 4
    assert sorted(asked[:4]) == sorted(asked[4:])
    assert [s.tokens for s in first] == [s.tokens for s in again]


async def test_path_of_the_sample_goes_before_the_flag():
    async with fake_engine() as engine:
        args = make_args(engine.url, custom_generate_function_path=f"{PLUGINS}.fan_out")
        sample = FakeDataSource(args).get_samples(1)[0][0]
        sample.generate_function_path = f"{PLUGINS}.two_turns"
        assert isinstance(await generate_and_rm(args, sample, {}), Sample)


async def test_fan_out_siblings_share_an_execution_and_are_rewarded():
    async with fake_engine() as engine:
        args = make_args(engine.url, custom_generate_function_path=f"{PLUGINS}.fan_out")
        group = await run_group(args)
    assert [[s.rollout_id for s in siblings] for siblings in group] == [[0, 0], [1, 1]]
    assert [s.reward for s in flatten(group)] == [1.0] * 4


async def test_fan_out_without_a_common_id_fails_the_sample():
    async with fake_engine() as engine:
        args = make_args(engine.url, custom_generate_function_path=f"{PLUGINS}.fan_out_without_id")
        group = await run_group(args)
    assert [s.status for s in group] == [Status.FAILED] * 2
    assert "share a number" in group[0].metadata["error"]


async def test_error_in_custom_generate_fails_one_sample_and_restores_it(
    caplog: pytest.LogCaptureFixture,
):
    async with fake_engine() as engine:
        args = make_args(engine.url, custom_generate_function_path=f"{PLUGINS}.breaks_half_way")
        with caplog.at_level(logging.WARNING):
            broken, fine = await run_group(args)
    assert broken.status is Status.FAILED
    assert (broken.tokens, broken.response_length, broken.loss_mask) == ([5, 6], 0, [])
    assert (broken.reward, broken.remove_sample) == (None, True)
    assert broken.metadata == {"error_cat": "generate", "error": "KeyError: 'tool'"}
    assert (fine.status, fine.reward) == (Status.COMPLETED, 1.0)
    assert "sample 0 failed (generate)" in caplog.text
    assert "breaks_half_way" in caplog.text  # the traceback


async def test_a_tool_that_hangs_fails_its_own_sample_after_the_deadline():
    async with fake_engine() as engine:
        path = f"{PLUGINS}.hangs_for_index_0"
        args = make_args(engine.url, custom_generate_function_path=path, generate_timeout_s=0.2)
        hung, fine = await run_group(args)
    assert (hung.status, hung.metadata["error_cat"]) == (Status.FAILED, "timeout")
    assert "within 0.2 s (--generate-timeout-s)" in hung.metadata["error"]
    assert (fine.status, fine.reward) == (Status.COMPLETED, 1.0)


async def test_hooks_run_in_order_before_the_reward():
    async with fake_engine() as engine:
        hooks = [f"{PLUGINS}.note_round", f"{PLUGINS}.replace_label"]
        group = await run_group(make_args(engine.url, rollout_sample_hook_path=hooks))
    assert group[0].metadata["hook"] == (3, False)
    assert group[0].label == "replaced"
    assert group[0].reward == 1.0


async def test_error_in_a_hook_or_a_reward_fails_the_sample_but_keeps_its_text():
    for change, category in (
        ({"rollout_sample_hook_path": [f"{PLUGINS}.failing_hook"]}, "hook"),
        ({"custom_rm_path": f"{PLUGINS}.reward_fails_for_index_0"}, "reward"),
    ):
        async with fake_engine() as engine:
            bad, good = await run_group(make_args(engine.url, **change))
        assert (bad.status, bad.metadata["error_cat"]) == (Status.FAILED, category)
        assert (bad.response_length, bad.loss_mask) == (4, [0] * 4)
        assert (good.status, good.reward) == (Status.COMPLETED, 1.0)


async def test_group_reward_sees_the_opened_group():
    async with fake_engine() as engine:
        args = make_args(
            engine.url,
            group_rm=True,
            custom_rm_path=f"{PLUGINS}.group_reward",
            custom_generate_function_path=f"{PLUGINS}.fan_out",
        )
        group = await run_group(args)
    assert [s.reward for s in flatten(group)] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("reply", "category"),
    [
        (Reply(status=500), "engine"),
        (Reply(status=400), "engine_protocol"),
        (Reply(body=b"garbage"), "engine_protocol"),
        (Reply(hold=True), "engine_unavailable"),
    ],
)
@pytest.mark.parametrize("supports", [False, True])
async def test_failed_request_fails_its_samples(reply: Reply, category: str, supports: bool):
    async with fake_engine(lambda payload, number: reply) as engine:
        timeout_s = 0.05 if reply.hold else 30.0
        args = make_args(
            engine.url, request_timeout_s=timeout_s, engine_supports_group_seeds=supports
        )
        group = await run_group(args)
    assert [s.status for s in group] == [Status.FAILED] * 2
    assert {s.metadata["error_cat"] for s in group} == {category}


DROPPED = Reply(status=400, body=b'{"message":"Request 0f3 was aborted","code":400}')


@pytest.mark.parametrize("facts", [{}, {"engine_heeds_seeds": False}])
async def test_requests_that_an_abort_met_before_they_ran_are_sent_again(facts: dict[str, Any]):
    async with fake_engine(lambda payload, number: DROPPED if number == 0 else Reply()) as engine:
        group = await run_group(make_args(engine.url, **facts))
    assert [s.status for s in group] == [Status.COMPLETED] * 2
    assert all(s.reward is not None and s.response_length for s in group)
    assert len(engine.requests) == 3


@pytest.mark.parametrize("facts", [{}, {"engine_heeds_seeds": False}])
async def test_requests_that_the_end_of_a_round_met_before_they_ran_are_not(facts: dict[str, Any]):
    def drop(payload: dict[str, Any], number: int) -> Reply:
        GenerateState(args).aborted = True
        return DROPPED

    async with fake_engine(drop) as engine:
        args = make_args(engine.url, **facts)
        group = await run_group(args)
    assert [s.status for s in group] == [Status.ABORTED] * 2
    assert is_unfinished(group)
    assert all(s.response_length == 0 and s.reward is None for s in group)


async def test_mistake_in_the_settings_stops_the_run():
    async with fake_engine() as engine:
        args = make_args(engine.url, custom_generate_function_path="no.such.function")
        with pytest.raises(ConfigError, match="no module"):
            await run_group(args)


async def test_older_tokens_are_masked_only_by_flag_and_only_if_older():
    async with fake_engine(lambda payload, number: Reply(ids=())) as engine:
        for flag, start, mask in ((True, 2, [0, 0]), (False, 2, None), (True, 3, None)):
            args = make_args(
                engine.url, partial_rollout=True, mask_offpolicy_in_partial_rollout=flag
            )
            GenerateState(args).start_round(3)
            sample = Sample(index=0, tokens=[1, 2, 3], response_length=2, status=Status.COMPLETED)
            sample.metadata = {"start_rollout_id": start}
            sample.reward = 1.0
            await generate_and_rm_group(args, [sample], {})
            assert sample.loss_mask == mask


async def test_all_failed_carries_the_first_cause():
    args = make_args("http://127.0.0.1:1")
    state = GenerateState(args)
    failed = [[Sample(status=Status.FAILED)]]
    raise_if_all_failed(state, [*failed, [Sample(status=Status.COMPLETED)]], "here")
    with pytest.raises(SlimeError, match=r"here: all 1 samples failed.*set Status\.FAILED"):
        raise_if_all_failed(state, failed, "here")
    state.failures["engine"] = EngineError("first")
    with pytest.raises(EngineError, match=r"first cause: EngineError\('first'\)"):
        raise_if_all_failed(state, failed, "here")


async def test_snapshot_is_not_touched_by_generation():
    sample = Sample(tokens=[1], metadata={"a": 1}, loss_mask=[])
    before = snapshot(sample)
    sample.tokens.append(2)
    sample.metadata["b"] = 2
    sample.prefix_cache_info.cached_tokens = 5
    assert before == Sample(tokens=[1], metadata={"a": 1}, loss_mask=[])
