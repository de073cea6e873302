import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import Reply, fake_engine, seeded_ids
from support.rollout_world import FakeDataSource, make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.data.sample import Sample
from slime.errors import ConfigError, EngineError, EngineProtocolError
from slime.rollout.generate import can_share_request, generate, generate_group, set_prompt_ids
from slime.rollout.state import GenerateState, sampling_params

Status = Sample.Status


def fresh() -> Sample:
    return Sample(index=0, prompt="abc", tokens=[5, 6], session_id="s1")


async def test_tokens_of_the_engine_are_appended_as_they_are():
    async with fake_engine(lambda payload, number: Reply(ids=(7, 8, 9))) as engine:
        args = make_args(engine.url)
        sample = await generate(args, fresh(), GenerateState(args).sampling_params)
    assert sample.tokens == [5, 6, 7, 8, 9]
    assert sample.response_length == 3
    assert sample.rollout_log_probs == [-0.5] * 3
    assert sample.loss_mask is None
    assert sample.weight_versions == ["0"]
    assert sample.response == "HIJ"
    assert sample.status is Status.COMPLETED


async def test_request_holds_what_the_protocol_asks_for():
    async with fake_engine() as engine:
        args = make_args(engine.url, rollout_stop=["x"], rollout_stop_token_ids=[3])
        await generate(args, fresh(), GenerateState(args).sampling_params)
    assert engine.requests == [
        {
            "input_ids": [5, 6],
            "return_logprob": True,
            "sampling_params": {
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "max_new_tokens": 16,
                "stop": ["x"],
                "stop_token_ids": [3],
                "skip_special_tokens": False,
                "no_stop_trim": True,
                "spaces_between_special_tokens": False,
            },
        }
    ]
    assert "X-SMG-Routing-Key" not in engine.headers[0]


@pytest.mark.parametrize(
    ("router_argv", "is_sent"),
    [
        ({"policy": "consistent_hashing"}, True),
        ({"policy": "manual"}, True),
        ({"policy": "round_robin", "routing_key_override": True}, True),
        ({"policy": "round_robin"}, False),
        # With a key it would no longer look at the prefix.
        ({"policy": "prefix_hash"}, False),
        ({"policy": "cache_aware"}, False),
        ({}, False),
    ],
)
async def test_session_is_the_routing_key_where_the_router_routes_by_keys(
    router_argv: dict[str, object], is_sent: bool
):
    async with fake_engine() as engine:
        await generate(make_args(engine.url, router_argv=router_argv), fresh(), {})
    assert engine.headers[0].get("X-SMG-Routing-Key") == ("s1" if is_sent else None)


async def test_routed_experts_are_asked_for_only_by_flag():
    async with fake_engine() as engine:
        await generate(make_args(engine.url, use_rollout_routing_replay=True), fresh(), {})
    assert engine.requests[0]["return_routed_experts"] is True


async def test_length_limit_gives_truncated():
    async with fake_engine(lambda payload, number: Reply(ids=(1,), finish="length")) as engine:
        sample = await generate(make_args(engine.url), fresh(), {"max_new_tokens": 1})
    assert sample.status is Status.TRUNCATED


async def test_partial_sample_goes_on_with_what_is_left(tmp_path: Path):
    async with fake_engine(lambda payload, number: Reply(ids=(40, 41))) as engine:
        args = make_args(engine.url, hf_checkpoint=make_char_tokenizer(tmp_path))
        sample = fresh()
        sample.append_response_tokens(args, tokens=[30, 31, 32], log_probs=[-1.0] * 3, text="?")
        sample.status = Status.ABORTED
        await generate(args, sample, {"max_new_tokens": 10, "skip_special_tokens": False})
        assert engine.requests[0]["input_ids"] == [5, 6, 30, 31, 32]
        assert engine.requests[0]["sampling_params"]["max_new_tokens"] == 7
        assert sample.response == GenerateState(args).tokenizer.decode([30, 31, 32, 40, 41])
    assert sample.rollout_log_probs == [-1.0] * 3 + [-0.5] * 2
    assert sample.status is Status.COMPLETED


async def test_partial_sample_without_room_is_truncated_without_a_request():
    async with fake_engine() as engine:
        sample = fresh()
        sample.tokens += [1, 2]
        sample.response_length = 2
        await generate(make_args(engine.url), sample, {"max_new_tokens": 2})
    assert sample.status is Status.TRUNCATED
    assert not engine.requests


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"meta_info": {"completion_tokens": 2}}', "2 completion_tokens without"),
        (b'{"meta_info": {"output_token_logprobs": [[1]]}}', "must be a list of"),
        (b'[{"meta_info": {}}, {"meta_info": {}}]', "gave 2 answers, expected 1"),
        (b'{"meta_info": {"finish_reason": {"type": "odd"}}}', "odd"),
    ],
)
async def test_answer_that_contradicts_itself_changes_nothing(body: bytes, message: str):
    async with fake_engine(lambda payload, number: Reply(body=body)) as engine:
        sample = fresh()
        with pytest.raises(EngineProtocolError, match=message):
            await generate(make_args(engine.url), sample, {})
    assert sample == fresh()


async def test_group_is_served_by_one_request_with_a_seed_each():
    async with fake_engine() as engine:
        args = make_args(engine.url, engine_supports_group_seeds=True, n_samples_per_prompt=3)
        group = FakeDataSource(args).get_samples(1)[0]
        assert can_share_request(args, group, {})
        await generate_group(args, group, {"max_new_tokens": 16}, [11, 12, 13])
    (request,) = engine.requests
    assert request["sampling_params"]["n"] == 3
    assert request["sampling_seeds"] == [11, 12, 13]
    assert [tuple(s.tokens[2:]) for s in group] == [seeded_ids(seed) for seed in (11, 12, 13)]
    assert all(s.status is Status.COMPLETED for s in group)


async def test_short_answers_share_a_request_where_no_seed_matters():
    async with fake_engine() as engine:
        args = make_args(engine.url, engine_heeds_seeds=False)
        group = FakeDataSource(args).get_samples(1)[0]
        assert can_share_request(args, group, {"max_new_tokens": 4_096})
        await generate_group(args, group, {"max_new_tokens": 16}, [11, 12])
    (request,) = engine.requests
    assert request["sampling_params"]["n"] == 2
    assert "sampling_seeds" not in request
    assert "sampling_seed" not in request["sampling_params"]
    assert [tuple(s.tokens[2:]) for s in group] == [seeded_ids(0), seeded_ids(1)]


@pytest.mark.parametrize(
    ("facts", "longest"),
    [
        ({"engine_heeds_seeds": False}, 4_097),
        ({"engine_heeds_seeds": False}, None),
        ({"engine_heeds_seeds": True}, 8),
        ({}, 8),
    ],
)
def test_long_answers_and_seeds_that_matter_have_requests_of_their_own(
    facts: dict[str, Any], longest: int | None
):
    args = make_args("http://127.0.0.1:1", **facts)
    group = FakeDataSource(args).get_samples(1)[0]
    assert not can_share_request(args, group, {"max_new_tokens": longest})


async def test_group_request_that_fails_leaves_samples_pending():
    async with fake_engine(lambda payload, number: Reply(status=500)) as engine:
        args = make_args(engine.url, engine_supports_group_seeds=True)
        group = FakeDataSource(args).get_samples(1)[0]
        with pytest.raises(EngineError):
            await generate_group(args, group, {}, [1, 2])
    assert all(s.status is Status.PENDING for s in group)


async def test_group_is_not_shared_when_it_is_not_alike():
    args = make_args("http://127.0.0.1:1", engine_supports_group_seeds=True)

    def shared(**change: object) -> bool:
        group = FakeDataSource(args).get_samples(1)[0]
        vars(group[1]).update(change)
        return can_share_request(args, group, {})

    assert shared()
    assert not shared(prompt="other")
    assert not shared(tokens=[5, 6, 7], response_length=1)
    assert not shared(status=Status.ABORTED)
    assert not shared(generate_function_path="a.b")
    assert not shared(index=None)
    for name, value in (
        ("engine_supports_group_seeds", False),
        ("custom_generate_function_path", "a.b"),
    ):
        setattr(args, name, value)
        assert not shared()
        setattr(args, name, True if value is False else None)
    assert not can_share_request(make_args("http://127.0.0.1:1"), [fresh(), fresh()], {})


async def test_text_and_messages_are_tokenised_once(tmp_path: Path):
    args = make_args("http://127.0.0.1:1", hf_checkpoint=make_char_tokenizer(tmp_path))
    state = GenerateState(args)
    text, chat = Sample(prompt="ab"), Sample(prompt=[{"role": "user", "content": "hi"}])
    set_prompt_ids(state, text)
    set_prompt_ids(state, chat)
    assert state.tokenizer.decode(text.tokens) == "ab"
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert state.tokenizer.decode(chat.tokens) == rendered
    set_prompt_ids(state, given := Sample(prompt="ab", tokens=[1]))
    assert given.tokens == [1]
    with pytest.raises(ConfigError, match="--custom-generate-function-path"):
        set_prompt_ids(state, Sample(prompt="ab", multimodal_inputs={"image": []}))


async def test_state_belongs_to_one_args_object():
    one, other = make_args("http://127.0.0.1:1"), make_args("http://127.0.0.1:2")
    assert GenerateState(one) is GenerateState(one)
    assert GenerateState(other).router_url == "http://127.0.0.1:2"
    known = len(GenerateState._states)
    del other
    assert len(GenerateState._states) == known - 1


async def test_unset_sampling_parameters_are_left_out():
    params = sampling_params(make_args("http://127.0.0.1:1", rollout_max_response_len=None))
    assert "max_new_tokens" not in params
    assert "stop" not in params


async def test_slots_never_deadlock_and_never_exceed_the_capacity():
    args = make_args("http://127.0.0.1:1", sglang_server_concurrency=3)
    state = GenerateState(args)
    held = most = 0

    async def hold(size: int) -> None:
        nonlocal held, most
        async with state.slots(size):
            held += min(size, 3)
            most = max(most, held)
            await asyncio.sleep(0)
            held -= min(size, 3)

    await asyncio.gather(*(hold(size) for size in (2, 2, 1, 5, 3, 1, 2)))
    assert most == 3


@pytest.mark.parametrize(
    ("mode", "spans"),
    [(None, [(0, "0"), (4, "1")]), ("in_place", [(0, "?..0"), (4, "0..1")])],
)
async def test_what_an_engine_does_not_tell_is_not_made_up(
    tmp_path: Path, mode: str | None, spans: list[tuple[int, str]]
):
    async with fake_engine() as engine:
        args = make_args(
            engine.url, update_weight_pause_mode=mode, hf_checkpoint=make_char_tokenizer(tmp_path)
        )
        sample = await generate(args, fresh(), {})
        engine.weight_version = "1"
        await generate(args, sample, {})
        assert sample.version_spans == spans
        # By now the newest version is known: an answer that is wholly of it has no mark.
        other = await generate(args, fresh(), {})
    assert other.version_spans == [(0, "1")]


async def test_the_version_is_asked_for_where_answers_do_not_tell_it():
    async with fake_engine() as engine:
        engine.weight_version = "5"
        state = GenerateState(make_args(engine.url, update_weight_pause_mode="in_place"))
        await state.learn_version()
        assert state.weight_version == "5"
        # Answers are read in another order than they were written.
        state.record({"weight_version": "4"})
        assert state.weight_version == "5"
        silent = GenerateState(make_args(engine.url))
        await silent.learn_version()
        assert silent.weight_version is None
