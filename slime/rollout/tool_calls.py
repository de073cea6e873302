"""Tool calls in an answer: JSON between <tool_call> tags, as Qwen, Hermes and their relatives write them."""

import json
import re
from dataclasses import dataclass
from typing import Any

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call that the model asks for.

    Attributes:
        name: of the tool.
        arguments: by name.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class BadToolCall:
    """Something between the tags that is no call.

    Attributes:
        text: as the model wrote it.
        reason: what is wrong with it, in words that the model may be told.
    """

    text: str
    reason: str


def parse_tool_calls(text: str) -> list[ToolCall | BadToolCall]:
    """The calls in an answer, in order; several are meant to run at the same time.

    A block that was not closed counts: the closing tag may be the stop string, and cut off.
    """
    return [_parsed(block.strip()) for block in _BLOCK.findall(text)]


def split_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """(what stands around the calls, the calls); what is no call between the tags stays text.

    With a call, space around the rest goes too.
    """
    calls = list[ToolCall]()

    def taken(block: re.Match[str]) -> str:
        call = _parsed(block[1].strip())
        if isinstance(call, BadToolCall):
            return block[0]
        calls.append(call)
        return ""

    rest = _BLOCK.sub(taken, text)
    return (rest.strip() if calls else rest), calls


def _parsed(block: str) -> ToolCall | BadToolCall:
    try:
        call = json.loads(block)
    except (ValueError, RecursionError) as error:
        return BadToolCall(block, f"no JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return BadToolCall(block, 'no object with a "name"')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return BadToolCall(block, '"arguments" must be an object')
    return ToolCall(call["name"], arguments)
