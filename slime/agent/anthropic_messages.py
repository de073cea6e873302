"""Anthropic's messages: POST /v1/messages."""

import json
from collections.abc import Iterator
from typing import Any, cast

from slime.agent.apis import Conversations, Json, event, pieces
from slime.agent.asked import Answer, ApiError, Ask, Call, assistant_message
from slime.agent.body import Body, joined_text
from slime.agent.openai_chat import check_conversation
from slime.agent.openai_common import CANNOT_FORCE
from slime.data.chat import Message

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}
OVERLOADED = 529
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class AnthropicMessages:
    """Messages."""

    keep_alive = event({"type": "ping"}, name="ping")

    def parse(self, body: Any, session: Conversations, *, counting: bool = False) -> Ask:
        """What the request asks; see `Api`.

        Args:
            counting: the request only wants its tokens counted, and names no limit.
        """
        request = Body(body)
        messages: list[Message] = []
        if system := joined_text(request.any("system"), "system"):
            messages.append({"role": "system", "content": system})
        given = cast(list[Any], request.take("messages", list, required=True) or [])
        for number, raw in enumerate(given):
            messages += _messages(raw, f"messages[{number}]")
        check_conversation([message for message in messages if message["role"] != "system"])
        max_tokens = request.whole("max_tokens", 1)
        if max_tokens is None and not counting:
            raise request.error("max_tokens", "is missing")
        _free_text(request)
        may_call, one_call = _choice(request)
        ask = Ask(
            model=request.text("model"),
            messages=messages,
            tools=_tools(request),
            sampling=_sampling(request),
            max_tokens=max_tokens,
            stop=request.texts("stop_sequences"),
            may_call=may_call,
            one_call=one_call,
            stream=bool(request.take("stream", bool)),
        )
        request.done()
        return ask

    def reply(self, answer: Answer, ask: Ask, session: Conversations) -> Json:
        """A message object."""
        content: list[Json] = []
        if answer.content:
            content.append({"type": "text", "text": answer.content})
        for call in answer.calls:
            content.append(_opened(call) | {"input": json.loads(call.arguments)})
        return _head(answer, ask) | {"content": content} | _end(answer)

    def events(self, answer: Answer, ask: Ask, session: Conversations) -> Iterator[bytes]:
        """message_start ... message_stop."""
        start = _head(answer, ask) | {"content": [], "stop_reason": None, "stop_sequence": None}
        start["usage"] = start["usage"] | {"output_tokens": 0}
        yield event({"type": "message_start", "message": start}, name="message_start")
        blocks: list[tuple[Json, str, str, str]] = []
        if answer.content:
            block = {"type": "text", "text": ""}
            blocks.append((block, "text_delta", "text", answer.content))
        for call in answer.calls:
            blocks.append((_opened(call), "input_json_delta", "partial_json", call.arguments))
        for index, (block, kind, key, text) in enumerate(blocks):
            yield _sent("content_block_start", index=index, content_block=block)
            for piece in pieces(text):
                yield _sent("content_block_delta", index=index, delta={"type": kind, key: piece})
            yield _sent("content_block_stop", index=index)
        end = _end(answer)
        yield _sent("message_delta", delta=end, usage={"output_tokens": answer.num_written})
        yield _sent("message_stop")

    def error(self, error: ApiError) -> Json:
        """{"type": "error", "error": {...}}."""
        kind = "invalid_request_error" if error.status < 500 else "api_error"
        return {
            "type": "error",
            "error": {"type": _TYPES.get(error.status, kind), "message": str(error)},
        }

    def error_event(self, error: ApiError) -> bytes:
        """An event of type "error"."""
        return event(self.error(error), name="error")

    def status(self, error: ApiError) -> int:
        """Anthropic has a number of its own for "try again later"."""
        return OVERLOADED if error.status == 503 else error.status


def _free_text(request: Body) -> None:
    """Refuse what changes the answer and is not built."""
    if (thinking := request.take("thinking", dict)) is not None:
        why = "the model thinks as its chat template lets it"
        Body(thinking, "thinking.").only("type", ("disabled",), why)
    request.ignore("metadata", "service_tier", "cache_control")


def _sampling(request: Body) -> dict[str, float]:
    found = {
        "temperature": request.number("temperature", 0, 1),
        "top_p": request.number("top_p", 0, 1),
        "top_k": request.whole("top_k", 1),
    }
    return {name: value for name, value in found.items() if value is not None}


def _tools(request: Body) -> list[dict[str, Any]] | None:
    tools: list[dict[str, Any]] = []
    for number, raw in enumerate(cast(list[Any], request.take("tools", list) or [])):
        tool = Body(raw, f"tools[{number}].")
        tool.only("type", ("custom",), "tools of the provider's own do not run here")
        function = {
            "name": tool.text("name"),
            "description": tool.take("description", str) or "",
            "parameters": tool.take("input_schema", dict, required=True),
        }
        tool.ignore("cache_control", "strict")
        tool.done()
        tools.append({"type": "function", "function": function})
    return tools or None


def _choice(request: Body) -> tuple[bool, bool]:
    """(the answer may call tools, at most one)."""
    choice = Body(request.take("tool_choice", dict) or {}, "tool_choice.")
    kind = choice.only("type", ("auto", "none"), CANNOT_FORCE)
    one_call = bool(choice.take("disable_parallel_tool_use", bool))
    choice.done()
    return kind != "none", one_call


def _messages(raw: Any, where: str) -> list[Message]:
    """The messages of one: tool results are messages of their own, in front of what the user says."""
    body = Body(raw, f"{where}.")
    role = body.text("role")
    if role not in ("user", "assistant"):
        raise body.error("role", f"must be 'user' or 'assistant', found {role!r}")
    content = body.any("content")
    body.done()
    if not isinstance(content, list):
        return [{"role": role, "content": joined_text(content, f"{where}.content")}]
    texts: list[str] = []
    results: list[Message] = []
    calls: list[Call] = []
    for number, part in enumerate(cast(list[Any], content)):
        place = f"{where}.content[{number}]"
        block = Body(part, f"{place}.")
        kind = block.text("type")
        block.ignore("cache_control", "citations")
        if kind == "text":
            texts.append(block.text("text"))
        elif kind == "tool_use" and role == "assistant":
            given = json.dumps(block.take("input", dict) or {})
            calls.append(Call(block.text("id"), block.text("name"), given))
            block.ignore("caller")
        elif kind == "tool_result" and role == "user":
            text = joined_text(block.any("content"), f"{place}.content")
            block.ignore("is_error")  # chat templates have no place for it; the text says so
            call_id = block.text("tool_use_id")
            results.append({"role": "tool", "content": text, "tool_call_id": call_id})
        else:
            raise ApiError(
                f"{place}: blocks of type {kind!r} are not supported in messages of the {role}",
                param=place,
                code="unsupported_content",
            )
        block.done()
    text = "\n".join(texts)
    if role == "assistant":
        return [assistant_message(text, calls)]
    return [*results, {"role": "user", "content": text}] if texts or not results else results


def _sent(kind: str, **data: Any) -> bytes:
    return event({"type": kind, **data}, name=kind)


def _opened(call: Call) -> Json:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}


def _end(answer: Answer) -> Json:
    if answer.stop_string is not None and not answer.calls:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_string}
    return {"stop_reason": _REASONS[answer.finish], "stop_sequence": None}


def _head(answer: Answer, ask: Ask) -> Json:
    return {
        "id": f"msg_{answer.id}",
        "type": "message",
        "role": "assistant",
        "model": ask.model,
        "usage": {
            "input_tokens": answer.num_prompt - answer.num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": answer.num_cached,
            "output_tokens": answer.num_written,
        },
    }
