"""OpenAI's chat completions: POST /v1/chat/completions."""

from collections.abc import Iterator
from typing import Any, cast

from slime.agent.apis import Conversations, Json, event, pieces
from slime.agent.asked import Answer, ApiError, Ask, Call, assistant_message
from slime.agent.body import Body, joined_text
from slime.agent.openai_common import (
    HARMLESS,
    ONE_ANSWER,
    error_object,
    take_sampling,
    take_tool_choice,
    take_tools,
)
from slime.data.chat import Message


class OpenAIChat:
    """Chat completions."""

    keep_alive = b": waiting\n\n"

    def parse(self, body: Any, session: Conversations) -> Ask:
        """What the request asks; see `Api`."""
        request = Body(body)
        messages = [
            _message(raw, f"messages[{number}]")
            for number, raw in enumerate(request.take("messages", list, required=True) or [])
        ]
        check_conversation(messages)
        request.only("n", (1,), ONE_ANSWER)
        top = request.whole("top_logprobs", 0)
        if top:
            raise request.error("top_logprobs", "only the log-prob of the token itself is known")
        options = Body(request.take("stream_options", dict) or {}, "stream_options.")
        extras = {"usage": bool(options.take("include_usage", bool))}
        options.ignore("include_obfuscation")
        options.done()
        limits = (request.whole("max_completion_tokens", 1), request.whole("max_tokens", 1))
        _text_only(request)
        request.ignore(*HARMLESS)
        ask = Ask(
            model=request.text("model"),
            messages=messages,
            tools=take_tools(request, nested=True),
            sampling=take_sampling(request),
            max_tokens=min((limit for limit in limits if limit is not None), default=None),
            stop=request.texts("stop"),
            seed=request.whole("seed", 0),
            may_call=take_tool_choice(request),
            one_call=request.take("parallel_tool_calls", bool) is False,
            wants_tokens=bool(request.take("logprobs", bool)),
            stream=bool(request.take("stream", bool)),
            extras=extras,
        )
        request.done()
        return ask

    def reply(self, answer: Answer, ask: Ask, session: Conversations) -> Json:
        """A chat.completion object."""
        message: Json = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [_call(call) for call in answer.calls]
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": answer.finish,
            "logprobs": _log_probs(answer, ask),
        }
        return _head(answer, ask, "chat.completion") | {
            "choices": [choice],
            "usage": _usage(answer),
        }

    def events(self, answer: Answer, ask: Ask, session: Conversations) -> Iterator[bytes]:
        """chat.completion.chunk objects, then [DONE]."""
        head = _head(answer, ask, "chat.completion.chunk")

        def chunk(delta: Json, finish: str | None = None, log_probs: Json | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": log_probs}
            return event(head | {"choices": [choice]})

        first: Json = {"role": "assistant", "content": "" if answer.content else None}
        yield chunk(first, log_probs=_log_probs(answer, ask))
        for piece in pieces(answer.content):
            yield chunk({"content": piece})
        for number, call in enumerate(answer.calls):
            opened = _call(call) | {
                "index": number,
                "function": {"name": call.name, "arguments": ""},
            }
            yield chunk({"tool_calls": [opened]})
            for piece in pieces(call.arguments):
                yield chunk({"tool_calls": [{"index": number, "function": {"arguments": piece}}]})
        yield chunk({}, answer.finish)
        if ask.extras["usage"]:
            yield event(head | {"choices": [], "usage": _usage(answer)})
        yield b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> Json:
        """{"error": {...}}."""
        return error_object(error)

    def error_event(self, error: ApiError) -> bytes:
        """The error as a chunk, which clients raise."""
        return event(error_object(error))

    def status(self, error: ApiError) -> int:
        """As it is."""
        return error.status


def check_conversation(messages: list[Message]) -> None:
    """Nothing, when the model's turn is next.

    Raises:
        ApiError: no messages, or the last one is the model's own.
    """
    if not messages:
        raise ApiError("messages: there are none", param="messages")
    if messages[-1]["role"] == "assistant":
        raise ApiError(
            "messages: the last one is the assistant's; an answer that goes on from given words is not "
            "supported",
            param="messages",
            code="unsupported_content",
        )


def _text_only(request: Body) -> None:
    """Refuse answers that are something else than free text."""
    form = request.take("response_format", dict)
    if form is not None:
        Body(form, "response_format.").only("type", ("text",), "answers are free text")
    request.only("modalities", (["text"],), "answers are text")
    request.only("logit_bias", ({},), "engines take none")


def _message(raw: Any, where: str) -> Message:
    body = Body(raw, f"{where}.")
    role = body.text("role")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise body.error("role", f"{role!r} is unknown")
    content = joined_text(body.any("content"), f"{where}.content")
    body.ignore("annotations", "parsed")  # the client's own copy of what it could read
    message: Message = {"role": "system" if role == "developer" else role, "content": content}
    if (name := body.take("name", str)) is not None and role != "assistant":
        message["name"] = name  # some chat templates write it
    if role == "tool":
        message["tool_call_id"] = body.text("tool_call_id")
    if role == "assistant":
        calls = cast(list[Any], body.take("tool_calls", list) or [])
        message = assistant_message(
            content,
            [_parsed_call(call, f"{where}.tool_calls[{i}].") for i, call in enumerate(calls)],
        )
    body.done()
    return message


def _parsed_call(raw: Any, where: str) -> Call:
    body = Body(raw, where)
    body.only("type", ("function",), "only functions are called")
    body.ignore("index")
    function = Body(body.take("function", dict, required=True), f"{where}function.")
    call = Call(body.text("id"), function.text("name"), function.text("arguments"))
    function.ignore("parsed_arguments")
    function.done()
    body.done()
    return call


def _call(call: Call) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _log_probs(answer: Answer, ask: Ask) -> Json | None:
    """Of every token that was written, tags and end token included."""
    if not ask.wants_tokens:
        return None
    entries = [
        {"token": text, "logprob": log_prob, "bytes": list(text.encode()), "top_logprobs": []}
        for text, log_prob in answer.tokens
    ]
    return {"content": entries, "refusal": None}


def _head(answer: Answer, ask: Ask, kind: str) -> Json:
    return {
        "id": f"chatcmpl-{answer.id}",
        "object": kind,
        "created": answer.created,
        "model": ask.model,
        "system_fingerprint": None,
    }


def _usage(answer: Answer) -> Json:
    return {
        "prompt_tokens": answer.num_prompt,
        "completion_tokens": answer.num_written,
        "total_tokens": answer.num_prompt + answer.num_written,
        "prompt_tokens_details": {"cached_tokens": answer.num_cached},
    }
