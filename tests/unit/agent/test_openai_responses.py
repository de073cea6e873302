"""Responses, asked by the client of OpenAI's own package."""

from pathlib import Path
from typing import Any

import openai
import pytest
from support.agent_world import ADD, END, PARAMETERS, World, agent_world, checked, trained_text

TOOL = {"type": "function", "name": "add", "description": "Adds.", "parameters": PARAMETERS}


def client_of(world: World, **more: Any) -> openai.AsyncOpenAI:
    session = world.session
    return openai.AsyncOpenAI(base_url=session.openai_base_url, api_key=session.api_key, **more)


async def ask(client: openai.AsyncOpenAI, given: Any, **more: Any) -> Any:
    defaults = {"model": "any", "instructions": "Be short.", "tools": [TOOL]}
    return await client.responses.create(**(defaults | {"input": given} | more))


@pytest.mark.parametrize("remembered", [True, False])
async def test_a_conversation_with_a_tool_keeps_every_token(tmp_path: Path, remembered: bool):
    async with agent_world(tmp_path, ["Adding." + ADD + END, "5!" + END, "Bye" + END]) as world:
        async with client_of(world) as client:
            given: list[Any] = [{"role": "user", "content": "2 + 3?"}]
            first = await ask(client, given)
            assert [item.type for item in first.output] == ["message", "function_call"]
            call = first.output[1]
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
            if remembered:
                second = await ask(client, [result], previous_response_id=first.id)
                third = await ask(client, "Bye?", previous_response_id=second.id)
            else:
                given += [item.model_dump(exclude_none=True) for item in first.output]
                given.append(result)
                second = await ask(client, given)
                given += [item.model_dump(exclude_none=True) for item in second.output]
                third = await ask(client, [*given, {"role": "user", "content": "Bye?"}])
            assert second.output_text == "5!"
            assert third.output_text == "Bye"
            assert third.status == "completed"
        [sample] = checked(world.session.samples())
    wrote = "Adding." + ADD + END + "5!" + END + "Bye" + END
    assert trained_text(sample, world.tokenizer) == wrote
    assert f"<|im_start|>tool\n5{END}\n<|im_start|>assistant\n5!{END}\n<|im_start|>user\nBye?" in (
        sample.response
    )


async def test_streams_say_the_same(tmp_path: Path):
    text = "One two. " * 20 + ADD + END
    async with agent_world(tmp_path, [text, text, "abcdef"]) as world, client_of(world) as client:
        request: Any = {"model": "any", "input": "2 + 3?", "tools": [TOOL]}
        async with client.responses.stream(**request) as stream:
            kinds = [event.type async for event in stream]
            streamed: Any = await stream.get_final_response()
        whole: Any = await client.responses.create(**request)
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] == "response.completed"
        assert kinds.count("response.output_text.delta") > 1
        assert streamed.output_text == whole.output_text
        assert streamed.output[1].arguments == whole.output[1].arguments
        assert streamed.usage == whole.usage
        short: Any = await client.responses.create(**request, max_output_tokens=3)
        assert (short.status, short.incomplete_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
        assert short.output_text == "abc"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format.type"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, more: dict[str, Any], named: str
):
    async with agent_world(tmp_path, []) as world, client_of(world) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client, more.pop("input", "2 + 3?"), **more)
        assert caught.value.param == named
        with pytest.raises(openai.NotFoundError, match="no response 'resp_1'"):
            await ask(client, "Go on", previous_response_id="resp_1")
    assert not world.engine.requests
