"""Executions of agents: what comes back to the rollout, also when a round ends, time is up or room is out."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from support.agent_world import END, TEMPLATE, agent_world, checked, make_sample, trained_text
from support.agents import client_of, say, user
from support.fake_engine import FakeEngine, Payload, Reply, fake_engine
from support.rollout_world import make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.agent import server
from slime.data.chat import load_tokenizer
from slime.data.sample import Sample
from slime.rollout.base_types import flatten
from slime.rollout.groups import generate_and_rm, generate_and_rm_group
from slime.rollout.state import GenerateState

Status = Sample.Status


def args_for(engine: FakeEngine, folder: Path, agent: str, **more: Any) -> Any:
    return make_args(
        engine.url,
        hf_checkpoint=str(folder),
        agent_function_path=f"support.agents.{agent}",
        custom_generate_function_path="slime.agent.generate.generate",
        **({"rollout_max_response_len": 4096} | more),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_char_tokenizer(tmp_path, chat_template=TEMPLATE)
    return tmp_path


async def run(args: Any, sample: Sample, **more: Any) -> list[Sample]:
    execution = await generate_and_rm(args, sample, GenerateState(args).sampling_params, **more)
    return flatten([execution])


async def test_branches_are_siblings_with_the_reward_of_the_whole(folder: Path):
    async with fake_engine() as engine:
        args = args_for(engine, folder, "two_branches")
        first, second = checked(await run(args, make_sample()))
        assert first.rollout_id == second.rollout_id == 7
        assert first.reward == second.reward == 0.5
        assert first.loss_mask is not None
        assert second.loss_mask is not None
        shared = first.tokens[: first.prompt_length + 4]
        assert second.tokens[: second.prompt_length + 4] == shared
        assert (first.loss_mask[:4], second.loss_mask[:4]) == ([1] * 4, [0] * 4)
        assert first.loss_mask[-4:] == second.loss_mask[-4:] == [1] * 4
        assert first.usage is not None
        assert first.usage["requests"] == 3
        assert first.usage["tokens_out"] == 12
        assert second.usage is None
        assert first.prefix_cache_info.cached_tokens + second.prefix_cache_info.cached_tokens == 3
        alone = checked(await run(args, make_sample(), evaluation=True))
        assert len(alone) == 1
        assert alone[0].tokens == second.tokens


async def test_requests_go_to_the_engine_with_the_samples_key_and_seeds_of_their_own(folder: Path):
    async with fake_engine() as engine:
        args = args_for(engine, folder, "same_seed_twice", router_argv={"policy": "manual"})
        group = [make_sample(), make_sample()]
        group[1].index = 8
        group[1].session_id = "other"
        await generate_and_rm_group(args, group, GenerateState(args).sampling_params)
        keys = sorted(headers["X-SMG-Routing-Key"] for headers in engine.headers)
        assert keys == ["key", "key", "other", "other"]
        seeds = [request["sampling_params"]["sampling_seed"] for request in engine.requests]
        # The same within an execution, as the API promises; another one in each.
        assert len(set(seeds)) == 2
        assert sorted(map(seeds.count, set(seeds))) == [2, 2]


async def test_a_full_round_gives_the_sample_back_empty(folder: Path):
    for agent in ("endless", "careless"):
        async with fake_engine(lambda payload, number: Reply(hold=number == 1)) as engine:
            args = args_for(engine, folder, agent)
            state = GenerateState(args)
            state.start_round(0)
            task = asyncio.create_task(run(args, make_sample()))
            await engine.holds(1)
            state.aborted = True
            await state.client.post("/abort_request", {"abort_all": True})
            [sample] = await asyncio.wait_for(task, 10)
        assert (sample.status, sample.tokens, sample.response_length) == (Status.ABORTED, [], 0)
        assert sample.reward is None
        assert sample.prompt == "unused"


async def test_an_answer_that_an_engine_cut_goes_on(folder: Path):
    """As weights change; nothing of it shows at the API."""

    def cut(payload: Payload, number: int) -> Reply:
        return Reply(ids=(50, 51), finish="abort") if number == 0 else Reply(ids=(52, 53))

    async with fake_engine(cut) as engine:
        args = args_for(engine, folder, "one_question")
        [sample] = checked(await run(args, make_sample()))
    assert sample.tokens[-4:] == [50, 51, 52, 53]
    assert sample.status is Status.COMPLETED
    assert len(sample.weight_versions) == 2


async def test_time_is_up_for_one_agent_alone(folder: Path):
    async with fake_engine(lambda payload, number: Reply(hold=True)) as engine:
        args = args_for(engine, folder, "one_question", generate_timeout_s=0.3)
        [sample] = await run(args, make_sample())
        await engine.holds(0)
    assert sample.status is Status.FAILED
    assert "--generate-timeout-s" in sample.metadata["error"]


@pytest.mark.parametrize(
    ("agent", "error"), [("silent", "without an answer"), ("wrong_result", "returned 'done'")]
)
async def test_what_an_agent_must_not_do_fails_its_sample(folder: Path, agent: str, error: str):
    async with fake_engine() as engine:
        [sample] = await run(args_for(engine, folder, agent), make_sample())
    assert sample.status is Status.FAILED
    assert error in sample.metadata["error"]


@pytest.mark.parametrize(
    ("limit", "value"), [("rollout_max_response_len", 40), ("rollout_max_context_len", 75)]
)
async def test_without_room_answers_are_empty_and_the_sample_is_truncated(
    tmp_path: Path, limit: str, value: int
):
    async with agent_world(tmp_path, ["abc" + END] * 9, **{limit: value}) as world:
        async with client_of(world.session) as client:
            said: list[Any] = [user("a")]
            finish = None
            while finish != "length":
                answer = await client.chat.completions.create(model="any", messages=said)
                finish = answer.choices[0].finish_reason
                said += [answer.choices[0].message.model_dump(), user("and what else is there?")]
        [sample] = checked(world.session.samples())
    assert sample.status is Status.TRUNCATED
    size = sample.response_length if "response" in limit else len(sample.tokens)
    assert 0 < size <= value
    assert sample.response_length


async def test_a_prompt_without_room_is_a_truncated_sample(tmp_path: Path):
    async with agent_world(tmp_path, [], rollout_max_context_len=5) as world:
        async with client_of(world.session) as client:
            message = await say(client, user("a"))
        [sample] = checked(world.session.samples())
    assert message["content"] == ""
    assert (sample.status, sample.response_length) == (Status.TRUNCATED, 0)


async def test_the_runs_sampling_can_hold_and_is_noted(tmp_path: Path):
    replies = ["a" + END, "b" + END]
    async with agent_world(tmp_path, replies, agent_sampling="run") as world:
        async with client_of(world.session) as client:
            create = client.chat.completions.with_raw_response.create
            same: Any = {"model": "any", "messages": [user("a")]}
            noted = await create(**same, temperature=0.3, top_p=1.0)
            plain = await create(**same, temperature=1.0)
        params = [request["sampling_params"] for request in world.engine.requests]
        assert [one["temperature"] for one in params] == [1.0, 1.0]
        assert noted.headers["x-slime-overridden"] == "temperature"
        assert "x-slime-overridden" not in plain.headers
        assert world.session.overridden == {"temperature": 1}
        first, second = checked(world.session.samples())
        assert trained_text(first, world.tokenizer) == "a" + END
        assert trained_text(second, world.tokenizer) == "b" + END


async def test_the_requests_sampling_can_hold_and_then_does_not_train(tmp_path: Path):
    replies = ["a" + END, "b" + END]
    async with agent_world(tmp_path, replies, agent_sampling="request") as world:
        async with client_of(world.session) as client:
            first = await say(client, user("a"), temperature=0.3, presence_penalty=1)
            await say(client, user("a"), first, user("b"))
        params = [request["sampling_params"] for request in world.engine.requests]
        assert [one["temperature"] for one in params] == [0.3, 1.0]
        assert params[0]["presence_penalty"] == 1
        [sample] = checked(world.session.samples())
    assert trained_text(sample, world.tokenizer) == "b" + END
    assert sample.response.startswith("a" + END)


async def test_a_long_answer_keeps_its_stream_alive(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.05)
    wrong = Reply(hold=True, body=b'{"text": "a"}')
    async with agent_world(tmp_path, [Reply(hold=True, ids=(50, 51)), wrong]) as world:
        session = world.session
        async with client_of(session) as client:
            for number in range(2):
                request: Any = {"model": "any", "messages": [user("a")], "stream": True}
                async with await client.chat.completions.create(**request) as stream:
                    # Headers are there, so the stream lives; the answer is not.
                    assert world.engine.held == 1
                    world.engine.release()
                    if number:
                        with pytest.raises(openai.APIError, match="the engine refused"):
                            [chunk async for chunk in stream]
                    else:
                        chunks = [chunk async for chunk in stream]
                        assert chunks[-1].choices[0].finish_reason == "stop"
                world.engine._released.clear()


async def test_many_agents_at_once(folder: Path):
    async with fake_engine() as engine:
        args = args_for(engine, folder, "two_branches", sglang_server_concurrency=1000)
        samples = [make_sample() for _ in range(100)]
        for number, sample in enumerate(samples):
            sample.index = number
        done = await asyncio.gather(*(run(args, sample) for sample in samples))
        assert len(engine.requests) == 300
    tokenizer: Any = load_tokenizer(str(folder))
    for number, parts in enumerate(done):
        assert [part.rollout_id for part in checked(parts)] == [number, number]
        assert [tokenizer.decode(part.tokens).count("assistant") for part in parts] == [2, 2]
    assert not list(server._servers.values())[-1]


async def test_a_fault_of_the_endpoint_fails_the_sample_whatever_the_agent_makes_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    async def broken(*args: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr("slime.agent.session.generate", broken)
    async with fake_engine() as engine:
        for agent in ("careless", "one_question"):
            [sample] = await run(args_for(engine, folder, agent), make_sample())
            assert sample.status is Status.FAILED
            assert sample.metadata["error"] == "RuntimeError: out of order"
