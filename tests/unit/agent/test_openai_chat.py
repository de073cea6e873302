"""Chat completions, asked by the client of OpenAI's own package."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.agent_world import ADD, END, TOOL, World, agent_world, checked, trained_text
from support.fake_engine import Reply

USER = {"role": "user", "content": "What is 2 + 3?"}


def client_of(world: World, **more: Any) -> openai.AsyncOpenAI:
    session = world.session
    return openai.AsyncOpenAI(base_url=session.openai_base_url, api_key=session.api_key, **more)


async def test_a_conversation_with_a_tool_keeps_every_token(tmp_path: Path):
    async with agent_world(tmp_path, ["Let me see. " + ADD + END, "5." + END]) as world:
        async with client_of(world) as client:
            messages: list[Any] = [USER]
            first = await client.chat.completions.create(
                model="any", messages=messages, tools=[TOOL]
            )
            message = first.choices[0].message
            assert first.choices[0].finish_reason == "tool_calls"
            assert message.content == "Let me see."
            assert message.tool_calls is not None
            call: Any = message.tool_calls[0]
            assert (call.function.name, call.function.arguments) == ("add", '{"a": 2, "b": 3}')
            messages += [message.model_dump()]
            messages += [{"role": "tool", "tool_call_id": call.id, "content": "5"}]
            second = await client.chat.completions.create(
                model="any", messages=messages, tools=[TOOL]
            )
        assert second.choices[0].message.content == "5."
        assert second.choices[0].finish_reason == "stop"
        assert second.usage is not None
        assert second.usage.prompt_tokens == len(world.engine.requests[1]["input_ids"])
        [sample] = checked(world.session.samples())
    assert sample is world.sample
    told = f"\n<|im_start|>tool\n5{END}\n<|im_start|>assistant\n"
    assert world.tokenizer.decode(sample.tokens) == (
        world.prompts()[0] + "Let me see. " + ADD + END + told + "5." + END
    )
    assert world.prompts()[1] == world.prompts()[0] + "Let me see. " + ADD + END + told
    assert trained_text(sample, world.tokenizer) == "Let me see. " + ADD + END + "5." + END
    assert sample.response == "Let me see. " + ADD + END + told + "5." + END
    assert sample.status == "completed"
    assert sample.weight_versions == ["0", "0"]
    assert [version for _, version in sample.version_spans] == ["0", "", "0"]


async def test_streams_say_the_same(tmp_path: Path):
    text = "One two. " * 20
    replies = [text + ADD + END] * 2
    async with agent_world(tmp_path, replies) as world, client_of(world) as client:
        parts: dict[str, Any] = {"content": "", "arguments": "", "name": None, "finish": None}
        usage = None
        stream = await client.chat.completions.create(
            model="any", messages=[USER], tools=[TOOL], stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                parts["content"] += choice.delta.content or ""
                parts["finish"] = choice.finish_reason or parts["finish"]
                for call in choice.delta.tool_calls or []:
                    assert call.function is not None
                    parts["name"] = call.function.name or parts["name"]
                    parts["arguments"] += call.function.arguments or ""
        whole = await client.chat.completions.create(model="any", messages=[USER], tools=[TOOL])
    message = whole.choices[0].message
    assert message.tool_calls is not None
    function: Any = message.tool_calls[0].function
    assert parts["content"] == message.content
    assert (parts["name"], parts["arguments"]) == (function.name, function.arguments)
    assert parts["finish"] == "tool_calls"
    assert usage is not None
    assert usage == whole.usage


async def test_log_probs_stop_and_limits(tmp_path: Path):
    async with (
        agent_world(tmp_path, ["abcSTOP", "abcdef" + END]) as world,
        client_of(world) as client,
    ):
        cut = await client.chat.completions.create(
            model="any",
            messages=[USER],
            stop=["STOP"],
            logprobs=True,
            seed=3,
        )
        short = await client.chat.completions.create(
            model="any",
            messages=[USER],
            max_tokens=50,
            max_completion_tokens=4,
        )
    assert cut.choices[0].message.content == "abc"
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].logprobs is not None
    tokens = cut.choices[0].logprobs.content or []
    assert "".join(token.token for token in tokens) == "abcSTOP"
    assert {token.logprob for token in tokens} == {-0.5}
    assert world.engine.requests[0]["sampling_params"]["stop"] == ["STOP"]
    assert world.engine.requests[0]["sampling_params"]["sampling_seed"] == 3
    assert world.engine.requests[1]["sampling_params"]["max_new_tokens"] == 4
    assert short.choices[0].message.content == "abcd"
    assert short.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"n": 2}, "n"),
        ({"top_logprobs": 2, "logprobs": True}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"temperature": 0.3}, "temperature"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
        ({"messages": [USER, {"role": "assistant", "content": "It is"}]}, "messages"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
        ),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, more: dict[str, Any], named: str
):
    async with agent_world(tmp_path, []) as world, client_of(world) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**({"model": "any", "messages": [USER]} | more))
        assert caught.value.param == named
        assert named in caught.value.message
    assert not world.engine.requests


async def test_keys_paths_and_bodies(tmp_path: Path):
    async with agent_world(tmp_path, ["ok" + END]) as world, client_of(world) as client:
        with pytest.raises(openai.AuthenticationError, match="no open session"):
            await client.with_options(api_key="wrong").models.list()
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").chat.completions.create(
                model="any", messages=[USER]
            )
        with pytest.raises(openai.NotFoundError, match="no such path"):
            await client.completions.create(model="any", prompt="a")
        assert [model.id for model in (await client.models.list()).data] == ["policy"]
        url, key = world.session.openai_base_url, {"x-api-key": world.session.api_key}
        async with httpx.AsyncClient() as plain:
            answer = await plain.post(f"{url}/chat/completions", headers=key, content=b"{")
        assert answer.status_code == 400
        assert "no JSON" in answer.json()["error"]["message"]
    with pytest.raises(openai.APIConnectionError):  # with the last session the server ends
        await client_of(world, max_retries=0).models.list()


async def test_a_client_that_goes_away_leaves_nothing(tmp_path: Path):
    async with agent_world(tmp_path, [Reply(hold=True), "ok" + END]) as world:
        async with client_of(world, max_retries=0) as client:
            with pytest.raises(openai.APITimeoutError):
                await client.chat.completions.create(model="any", messages=[USER], timeout=0.2)
            await world.engine.holds(0)
            await client.chat.completions.create(model="any", messages=[USER])
        [sample] = checked(world.session.samples())
    assert trained_text(sample, world.tokenizer) == "ok" + END


async def test_engine_errors_have_a_status_that_clients_know(tmp_path: Path):
    wrong = Reply(body=b'{"text": "a", "meta_info": {"completion_tokens": 3}}')
    async with agent_world(tmp_path, [wrong], request_timeout_s=1.0) as world:
        async with client_of(world) as client:
            with pytest.raises(openai.InternalServerError, match="the engine refused"):
                await client.chat.completions.create(model="any", messages=[USER])
        assert len(world.engine.requests) == 1
        with pytest.raises(ValueError, match="without an answer of the model"):
            world.session.samples()
