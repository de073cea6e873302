"""What a request asks and what it gets, in one form for all three APIs."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from slime.data.chat import Message

Finish = Literal["stop", "length", "tool_calls"]


class ApiError(Exception):
    """A request that gets an error instead of an answer.

    Attributes:
        status: of HTTP.
        param: name of the parameter at fault.
        code: short name of the fault, as the providers have them.
        is_final: tell the provider's client not to try again by itself.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        is_final: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.is_final = is_final


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request.

    Attributes:
        model: as the request names it; the run's model answers whatever the name.
        messages: the whole conversation, as chat templates want it.
        tools: as chat templates want them; None: no tools.
        sampling: what it says of how to sample, by SGLang's names.
        max_tokens: most tokens of this answer; None: as many as there is room for.
        stop: strings that end the answer.
        seed: None: the run chooses.
        may_call: calls in the answer are read as such; False leaves them text.
        one_call: the answer ends after its first call.
        wants_tokens: each token of the answer is wanted with its log-prob.
        stream: the answer is wanted as events.
        extras: what only the API itself needs, to shape its answer.
    """

    model: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    sampling: dict[str, float] = field(default_factory=dict[str, float])
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    may_call: bool = True
    one_call: bool = False
    wants_tokens: bool = False
    stream: bool = False
    extras: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Call:
    """A tool call of an answer; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer.

    Attributes:
        id: unique, letters and digits.
        content: text without calls, end token and stop string.
        stop_string: that ended it.
        num_prompt, num_cached, num_written: tokens; those of the prompt that engines had in their cache.
        tokens: (text, log-prob) of each token that was written, where the request wants them.
        created: seconds since the epoch.
        overridden: names of sampling parameters in which the run's went before the request's.
    """

    id: str
    content: str
    calls: tuple[Call, ...] = ()
    finish: Finish
    stop_string: str | None = None
    num_prompt: int
    num_cached: int = 0
    num_written: int
    tokens: tuple[tuple[str, float], ...] = ()
    created: int
    overridden: tuple[str, ...] = ()

    @property
    def message(self) -> Message:
        """As chat templates want it when it comes back."""
        return assistant_message(self.content, self.calls)


def assistant_message(content: str, calls: tuple[Call, ...] | list[Call] = ()) -> Message:
    """What a model said, as chat templates want it: arguments as objects where they are such.

    Raises:
        ApiError: arguments that are no JSON object.
    """
    message: Message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call)},
            }
            for call in calls
        ]
    return message


def _arguments(call: Call) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments or "{}")
    except ValueError as error:
        raise ApiError(f"the arguments of the call to {call.name!r} are no JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ApiError(f"the arguments of the call to {call.name!r} must be a JSON object")
    return arguments
