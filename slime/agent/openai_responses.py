"""OpenAI's responses: POST /v1/responses."""

import itertools
from collections.abc import Iterator
from typing import Any, cast

from slime.agent.apis import Conversations, Json, event, pieces
from slime.agent.asked import Answer, ApiError, Ask, Call, assistant_message
from slime.agent.body import Body, joined_text
from slime.agent.openai_chat import check_conversation
from slime.agent.openai_common import (
    HARMLESS,
    error_object,
    take_sampling,
    take_tool_choice,
    take_tools,
)
from slime.data.chat import Message

_TEXTS = ("input_text", "output_text", "text")


class OpenAIResponses:
    """Responses. What `previous_response_id` names is remembered as long as the session lasts."""

    keep_alive = b": waiting\n\n"

    def parse(self, body: Any, session: Conversations) -> Ask:
        """What the request asks; see `Api`."""
        request = Body(body)
        given = _input(request.any("input"))
        previous = request.take("previous_response_id", str)
        if previous is not None:
            if previous not in session.conversations:
                raise ApiError(
                    f"previous_response_id: no response {previous!r} in this session",
                    status=404,
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            given = [*session.conversations[previous], *given]
        instructions = request.take("instructions", str)
        system: list[Message] = (
            [{"role": "system", "content": instructions}] if instructions else []
        )
        check_conversation(given)
        _text_only(request)
        request.ignore(*HARMLESS)
        ask = Ask(
            model=request.text("model"),
            messages=[*system, *given],
            tools=take_tools(request, nested=False),
            sampling=take_sampling(request),
            max_tokens=request.whole("max_output_tokens", 1),
            may_call=take_tool_choice(request),
            one_call=request.take("parallel_tool_calls", bool) is False,
            stream=bool(request.take("stream", bool)),
            extras={"conversation": given, "instructions": instructions, "previous": previous},
        )
        request.done()
        return ask

    def reply(self, answer: Answer, ask: Ask, session: Conversations) -> Json:
        """A response object; the conversation is remembered under its id."""
        session.conversations[_id(answer)] = [*ask.extras["conversation"], answer.message]
        return _response(answer, ask, "incomplete" if answer.finish == "length" else "completed")

    def events(self, answer: Answer, ask: Ask, session: Conversations) -> Iterator[bytes]:
        """response.created ... response.completed."""
        numbers = itertools.count()

        def sent(kind: str, **data: Any) -> bytes:
            return event({"type": kind, "sequence_number": next(numbers), **data}, name=kind)

        final = self.reply(answer, ask, session)
        begun = _response(answer, ask, "in_progress") | {"output": [], "usage": None}
        yield sent("response.created", response=begun)
        yield sent("response.in_progress", response=begun)
        for index, item in enumerate(final["output"]):
            place = {"item_id": item["id"], "output_index": index}
            opened = item | {"status": "in_progress"}
            opened |= {"content": []} if item["type"] == "message" else {"arguments": ""}
            yield sent("response.output_item.added", output_index=index, item=opened)
            if item["type"] == "message":
                part: Json = item["content"][0]
                place |= {"content_index": 0}
                yield sent("response.content_part.added", **place, part=part | {"text": ""})
                for piece in pieces(part["text"]):
                    yield sent("response.output_text.delta", **place, delta=piece, logprobs=[])
                yield sent("response.output_text.done", **place, text=part["text"], logprobs=[])
                yield sent("response.content_part.done", **place, part=part)
            else:
                kind = "response.function_call_arguments"
                for piece in pieces(item["arguments"]):
                    yield sent(f"{kind}.delta", **place, delta=piece)
                yield sent(f"{kind}.done", **place, arguments=item["arguments"], name=item["name"])
            yield sent("response.output_item.done", output_index=index, item=item)
        yield sent(f"response.{final['status']}", response=final)

    def error(self, error: ApiError) -> Json:
        """{"error": {...}}."""
        return error_object(error)

    def error_event(self, error: ApiError) -> bytes:
        """An event of type "error"."""
        data = {"type": "error", "sequence_number": 0, "code": error.code, "param": error.param}
        return event(data | {"message": str(error)} | error_object(error), name="error")

    def status(self, error: ApiError) -> int:
        """As it is."""
        return error.status


def _text_only(request: Body) -> None:
    """Refuse what changes the answer and is not built."""
    form = Body(request.take("text", dict) or {}, "text.")
    if (kind := form.take("format", dict)) is not None:
        Body(kind, "text.format.").only("type", ("text",), "answers are free text")
    form.done()
    reasoning = request.take("reasoning", dict) or {}
    Body(reasoning, "reasoning.").done()
    request.only("truncation", ("disabled",), "conversations are never cut")
    request.only("background", (False,), "requests are answered while they wait")
    # Of reasoning there is none to include.
    request.only("include", ([], ["reasoning.encrypted_content"]), "nothing else is kept")


def _input(given: Any) -> list[Message]:
    """Messages of `input`: a text, or items of which neighbours of the assistant are one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if given is None:
        return []
    if not isinstance(given, list):
        raise ApiError(
            f"input: must be a text or a list of items, found {given!r:.80}", param="input"
        )
    messages: list[Message] = []
    said: list[str] = []
    calls: list[Call] = []

    def close() -> None:
        if said or calls:
            messages.append(assistant_message("\n".join(said), calls))
            said.clear()
            calls.clear()

    for number, raw in enumerate(cast(list[Any], given)):
        where = f"input[{number}]"
        item = Body(raw, f"{where}.")
        kind = item.take("type", str) or "message"
        item.ignore("status")
        if kind == "function_call":
            item.ignore("id")
            calls.append(Call(item.text("call_id"), item.text("name"), item.text("arguments")))
        elif kind == "function_call_output":
            close()
            item.ignore("id")
            content = joined_text(item.any("output"), f"{where}.output", _TEXTS)
            call_id = item.text("call_id")
            messages.append({"role": "tool", "content": content, "tool_call_id": call_id})
        elif kind == "message":
            item.ignore("id")
            role = item.text("role")
            if role not in ("system", "developer", "user", "assistant"):
                raise item.error("role", f"{role!r} is unknown")
            content = joined_text(item.any("content"), f"{where}.content", _TEXTS)
            if role == "assistant":
                if calls:  # words after a call belong to the next answer
                    close()
                said.append(content)
            else:
                close()
                role = "system" if role == "developer" else role
                messages.append({"role": role, "content": content})
        else:
            raise ApiError(
                f"{where}.type: items of type {kind!r} are not supported",
                param=f"{where}.type",
                code="unsupported_content",
            )
        item.done()
    close()
    return messages


def _id(answer: Answer) -> str:
    return f"resp_{answer.id}"


def _output(answer: Answer) -> list[Json]:
    items: list[Json] = []
    status = "incomplete" if answer.finish == "length" else "completed"
    if answer.content or not answer.calls:
        part = {"type": "output_text", "text": answer.content, "annotations": [], "logprobs": []}
        message = {"id": f"msg_{answer.id}", "type": "message", "role": "assistant"}
        items.append(message | {"status": status, "content": [part]})
    for call in answer.calls:
        call_item = {"id": f"fc_{call.id}", "type": "function_call", "call_id": call.id}
        call_item |= {"name": call.name, "arguments": call.arguments, "status": "completed"}
        items.append(call_item)
    return items


def _response(answer: Answer, ask: Ask, status: str) -> Json:
    return {
        "id": _id(answer),
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "model": ask.model,
        "output": _output(answer),
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": ask.extras["instructions"],
        "previous_response_id": ask.extras["previous"],
        "max_output_tokens": ask.max_tokens,
        "metadata": {},
        "parallel_tool_calls": not ask.one_call,
        "temperature": ask.sampling.get("temperature"),
        "top_p": ask.sampling.get("top_p"),
        "tool_choice": "auto" if ask.may_call else "none",
        "tools": [
            {"type": "function", "strict": False, **tool["function"]} for tool in ask.tools or []
        ],
        "usage": {
            "input_tokens": answer.num_prompt,
            "input_tokens_details": {"cached_tokens": answer.num_cached},
            "output_tokens": answer.num_written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.num_prompt + answer.num_written,
        },
    }
