"""Agent functions for --agent-function-path, on the client of OpenAI's own package."""

import asyncio
import json
from typing import Any

import anthropic
import openai
from support.agent_world import PARAMETERS, TOOL

from slime.agent import Session
from slime.data.sample import Sample

MAX_TURNS = 5


def client_of(session: Session, **more: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=session.openai_base_url, api_key=session.api_key, **more)


async def say(client: openai.AsyncOpenAI, *messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The assistant's message, as it goes back into the conversation."""
    request: dict[str, Any] = {"model": "any", "messages": list(messages)} | more
    answer = await client.chat.completions.create(**request)
    return answer.choices[0].message.model_dump()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def one_question(session: Session, sample: Sample) -> None:
    async with client_of(session) as client:
        await say(client, user("a"))


async def two_branches(session: Session, sample: Sample) -> float:
    """Goes on from the same answer in two ways, one after the other, and gives the reward."""
    async with client_of(session) as client:
        first = await say(client, user("a"))
        await say(client, user("a"), first, user("b"))
        await say(client, user("a"), first, user("c"))
    return 0.5


async def same_seed_twice(session: Session, sample: Sample) -> None:
    async with client_of(session) as client:
        await asyncio.gather(*(say(client, user("a"), seed=5) for _ in range(2)))


async def silent(session: Session, sample: Sample) -> None:
    pass


async def careless(session: Session, sample: Sample) -> None:
    """Goes on whatever happens."""
    async with client_of(session, max_retries=0) as client:
        for _ in range(3):
            try:
                await say(client, user("a"))
            except openai.APIError:
                continue


async def endless(session: Session, sample: Sample) -> None:
    async with client_of(session) as client:
        said: list[dict[str, Any]] = [user("a")]
        while True:
            said += [await say(client, *said), user("more")]


async def wrong_result(session: Session, sample: Sample) -> str:
    await one_question(session, sample)
    return "done"


async def calculator(session: Session, sample: Sample) -> None:
    """Adds as long as the model wants it to, streaming, on chat completions."""
    async with client_of(session) as client:
        said: list[Any] = [user(f"What is {sample.index}?")]
        for _ in range(MAX_TURNS):
            async with client.chat.completions.stream(
                model="any", messages=said, tools=[TOOL]
            ) as stream:
                message = (await stream.get_final_completion()).choices[0].message
            said.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                return
            for call in message.tool_calls:
                arguments: Any = json.loads(call.function.arguments)
                total = str(arguments["a"] + arguments["b"])
                said.append({"role": "tool", "tool_call_id": call.id, "content": total})


async def claude_calculator(session: Session, sample: Sample) -> None:
    """The same on Anthropic's messages."""
    async with anthropic.AsyncAnthropic(
        base_url=session.anthropic_base_url, api_key=session.api_key
    ) as client:
        said: list[Any] = [user(f"What is {sample.index}?")]
        tools: Any = [{"name": "add", "description": "Adds.", "input_schema": PARAMETERS}]
        for _ in range(MAX_TURNS):
            answer = await client.messages.create(
                model="any", max_tokens=60, messages=said, tools=tools
            )
            said.append({"role": "assistant", "content": answer.content})
            calls: list[Any] = [block for block in answer.content if block.type == "tool_use"]
            if not calls:
                return
            results = [
                {
                    "type": "tool_result",
                    "tool_use_id": call.id,
                    "content": str(call.input["a"] + call.input["b"]),
                }
                for call in calls
            ]
            said.append({"role": "user", "content": results})


async def branching(session: Session, sample: Sample) -> None:
    """Responses: two questions after the same answer, then a third after the first of them."""
    async with client_of(session) as client:
        first = await client.responses.create(
            model="any", input=f"{sample.index}?", max_output_tokens=12
        )
        more: Any = {"model": "any", "max_output_tokens": 12}
        second = await client.responses.create(**more, input="b?", previous_response_id=first.id)
        async with asyncio.TaskGroup() as both:
            for text, before in (("c?", first), ("d?", second)):
                work = client.responses.create(**more, input=text, previous_response_id=before.id)
                both.create_task(work)
