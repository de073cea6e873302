"""From an engine's answer to what an agent reads: text, tool calls, why it ended."""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime.agent.asked import Answer, Ask, Call, Finish
from slime.data.chat import Tokenizer
from slime.data.next_turn import end_of_answer
from slime.data.sample import Sample
from slime.rollout.tool_calls import split_tool_calls

Status = Sample.Status

CALL_END = "</tool_call>"


@dataclass(frozen=True)
class AnswerText:
    """The words of an answer; see `Answer`."""

    content: str = ""
    calls: tuple[Call, ...] = ()
    stop_string: str | None = None
    tokens: tuple[tuple[str, float], ...] = ()


def request_params(params: Mapping[str, Any], ask: Ask, room: int | None) -> dict[str, Any]:
    """Parameters for `generate`: the settled ones with the request's stop strings.

    Args:
        room: tokens the answer may have.
    """
    settled = {name: value for name, value in params.items() if name != "max_new_tokens"}
    if room is not None:
        settled["max_new_tokens"] = room
    own = settled.get("stop") or []
    stops = [*([own] if isinstance(own, str) else own), *ask.stop]
    if ask.one_call and ask.tools and ask.may_call:
        stops.append(CALL_END)
    if stops:
        settled["stop"] = list(dict.fromkeys(stops))
    return settled


def read_text(tokenizer: Tokenizer, answer: Sample, ask: Ask) -> AnswerText:
    """What the model wrote, without the token and the stop string of the request that ended it.

    Calls are read where the request offers tools; what is none between the tags stays text, and so does
    the name of a tool that was not offered stay a call: agents tell the model of both.
    """
    ids = answer.tokens[answer.prompt_length :]
    text = tokenizer.decode(ids).removesuffix(end_of_answer(tokenizer, ids))
    stop = None
    if answer.status is Status.COMPLETED:
        stop = next((one for one in ask.stop if text.endswith(one)), None)
    text = text.removesuffix(stop or "")
    tokens: tuple[tuple[str, float], ...] = ()
    if ask.wants_tokens:
        log_probs = answer.rollout_log_probs or []
        tokens = tuple((tokenizer.decode([i]), p) for i, p in zip(ids, log_probs, strict=True))
    if not (ask.tools and ask.may_call):
        return AnswerText(text, (), stop, tokens)
    content, found = split_tool_calls(text)
    calls = [
        Call(f"call_{secrets.token_hex(12)}", call.name, json.dumps(call.arguments))
        for call in found
    ]
    return AnswerText(content, tuple(calls), stop, tokens)


def as_answer(
    answer: Sample, text: AnswerText | None = None, overridden: tuple[str, ...] = ()
) -> Answer:
    """The answer for the API to shape.

    Args:
        answer: of the engine.
        text: its words.
    """
    text = text or AnswerText()
    finish: Finish = "length" if answer.status is Status.TRUNCATED else "stop"
    if text.calls and finish == "stop":
        finish = "tool_calls"
    return Answer(
        id=secrets.token_hex(12),
        content=text.content,
        calls=text.calls,
        finish=finish,
        stop_string=text.stop_string,
        num_prompt=answer.prompt_length,
        num_cached=answer.prefix_cache_info.cached_tokens,
        num_written=answer.response_length,
        tokens=text.tokens,
        created=int(time.time()),
        overridden=overridden,
    )
