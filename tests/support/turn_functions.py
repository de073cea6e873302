"""Generate functions on slime.rollout.turns."""

import asyncio
from typing import Any

from slime.data.sample import Sample
from slime.rollout.tool_calls import BadToolCall, ToolCall, parse_tool_calls
from slime.rollout.turns import Turns, sibling_of


async def compute(call: ToolCall | BadToolCall) -> str:
    if isinstance(call, BadToolCall):
        raise ValueError(call.reason)
    await asyncio.sleep(0.01)
    return str(call.arguments["a"] + call.arguments["b"])


async def calculator(
    args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample:
    """Tool calls, several at once, told back as the chat template writes tool messages."""
    turns = Turns(args, sample, sampling_params, max_turns=5, evaluation=evaluation)
    while await turns.ask():
        calls = parse_tool_calls(turns.text)
        if not calls:
            break
        results = await turns.call(*map(compute, calls), errors="return")
        messages = [{"role": "tool", "content": str(result)} for result in results]
        if not turns.tell_messages(messages):
            break
    return sample


async def three_turns(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Talks to the model whatever it says, in turns of eight tokens; goes on where it was cut."""
    turns = Turns(args, sample, sampling_params)
    while True:
        await turns.ask(max_new_tokens=8)
        if sample.status is Sample.Status.ABORTED or turns.number == 3:
            return sample
        if not turns.tell(f" [{turns.number}] "):
            return sample


async def debate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> list[Sample]:
    """Two agents answer, a third one with another prompt sees both."""
    solvers = [sample, sibling_of(sample, sample.prompt)]
    await asyncio.gather(*(Turns(args, agent, sampling_params).ask() for agent in solvers))
    judge = sibling_of(sample, "".join(agent.response for agent in solvers))
    await Turns(args, judge, sampling_params).ask()
    return [*solvers, judge]
