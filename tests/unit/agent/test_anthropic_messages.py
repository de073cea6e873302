"""Messages, asked by the client of Anthropic's own package."""

from pathlib import Path
from typing import Any

import anthropic
import pytest
from support.agent_world import ADD, END, PARAMETERS, World, agent_world, checked, trained_text

TOOL = {"name": "add", "description": "Adds.", "input_schema": PARAMETERS}
USER = {"role": "user", "content": [{"type": "text", "text": "What is 2 + 3?"}]}


def client_of(world: World, **more: Any) -> anthropic.AsyncAnthropic:
    session = world.session
    return anthropic.AsyncAnthropic(
        base_url=session.anthropic_base_url, api_key=session.api_key, **more
    )


async def ask(client: anthropic.AsyncAnthropic, messages: list[Any], **more: Any) -> Any:
    defaults = {"model": "any", "max_tokens": 200, "system": "Be short.", "tools": [TOOL]}
    return await client.messages.create(**(defaults | {"messages": messages} | more))


async def test_a_conversation_with_two_calls_keeps_every_token(tmp_path: Path):
    async with agent_world(tmp_path, ["Adding." + ADD + ADD + END, "5!" + END]) as world:
        async with client_of(world) as client:
            first = await ask(client, [USER])
            assert first.stop_reason == "tool_use"
            assert [block.type for block in first.content] == ["text", "tool_use", "tool_use"]
            assert first.content[1].input == {"a": 2, "b": 3}
            results: list[Any] = [
                {"type": "tool_result", "tool_use_id": block.id, "content": "5"}
                for block in first.content[1:]
            ]
            results.append({"type": "text", "text": "Go on."})
            said = {"role": "assistant", "content": first.content}
            second = await ask(client, [USER, said, {"role": "user", "content": results}])
            assert second.content[0].text == "5!"
            assert second.stop_reason == "end_turn"
            assert second.usage.cache_read_input_tokens == 1
        [sample] = checked(world.session.samples())
    assert world.prompts()[0].startswith("<|im_start|>system\n{")
    assert "<|im_start|>system\nBe short." in world.prompts()[0]
    tool = f"<|im_start|>tool\n5{END}\n"
    told = f"\n{tool}{tool}<|im_start|>user\nGo on.{END}\n<|im_start|>assistant\n"
    assert sample.response == "Adding." + ADD + ADD + END + told + "5!" + END
    assert trained_text(sample, world.tokenizer) == "Adding." + ADD + ADD + END + "5!" + END


async def test_streams_say_the_same(tmp_path: Path):
    text = "One two. " * 20 + ADD + END
    async with agent_world(tmp_path, [text, text]) as world, client_of(world) as client:
        request: Any = {"model": "any", "max_tokens": 500, "messages": [USER], "tools": [TOOL]}
        async with client.messages.stream(**request) as stream:
            pieces = [piece async for piece in stream.text_stream]
            streamed = await stream.get_final_message()
        whole = await client.messages.create(**request)
    assert "".join(pieces) == whole.content[0].text
    assert len(pieces) > 1
    assert [block.type for block in streamed.content] == ["text", "tool_use"]
    assert streamed.content[1].input == whole.content[1].input
    assert streamed.stop_reason == whole.stop_reason == "tool_use"
    assert streamed.usage.output_tokens == whole.usage.output_tokens > 0


async def test_stop_limits_one_call_and_counts(tmp_path: Path):
    replies = ["abcSTOP", "abcdef" + END, ADD, "abc" + END]
    async with agent_world(tmp_path, replies) as world, client_of(world) as client:
        cut = await ask(client, [USER], stop_sequences=["STOP"])
        assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", "STOP")
        assert cut.content[0].text == "abc"
        short = await ask(client, [USER], max_tokens=4)
        assert (short.stop_reason, short.content[0].text) == ("max_tokens", "abcd")
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        one = await ask(client, [USER], tool_choice=choice)
        assert [block.type for block in one.content] == ["tool_use"]
        assert world.engine.requests[2]["sampling_params"]["stop"] == ["</tool_call>"]
        count = await client.messages.count_tokens(
            model="any", messages=[USER], system="Be short.", tools=[TOOL]
        )
        assert count.input_tokens == len(world.engine.requests[0]["input_ids"])
        none = await ask(client, [USER], tools=anthropic.NOT_GIVEN, system="")
        assert none.content[0].text == "abc"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"tools\[0\].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
        ({"extra_body": {"temperature": 0.3}}, "temperature"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
        ({"extra_body": {"output_format": {"type": "json"}}}, "output_format"),
        ({"messages": [USER, {"role": "assistant", "content": "It is"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            r"messages\[0\].content\[0\]: blocks of type 'image'",
        ),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, more: dict[str, Any], named: str
):
    async with agent_world(tmp_path, []) as world, client_of(world) as client:
        with pytest.raises(anthropic.BadRequestError, match=named) as caught:
            await ask(client, more.pop("messages", [USER]), **more)
        body: Any = caught.value.body
        assert body["error"]["type"] == "invalid_request_error"
    assert not world.engine.requests


async def test_keys_models_and_the_end_of_a_round(tmp_path: Path):
    async with agent_world(tmp_path, []) as world, client_of(world) as client:
        with pytest.raises(anthropic.AuthenticationError, match="no open session"):
            await client.with_options(api_key="wrong").models.list()
        assert [model.id for model in (await client.models.list()).data] == ["policy"]
        world.state.aborted = True
        with pytest.raises(anthropic.APIStatusError, match="the round is full") as caught:
            await ask(client, [USER])
        assert caught.value.status_code == 529
        assert world.session.is_aborted
        [sample] = world.session.samples()
        assert (sample.status, sample.tokens, sample.response_length) == ("aborted", [], 0)
