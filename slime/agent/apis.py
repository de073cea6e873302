"""Api: what the server needs of each provider's API. The three of them stand in files of their own."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import orjson

from slime.agent.asked import Answer, ApiError, Ask
from slime.data.chat import Message

Json = dict[str, Any]


class Conversations(Protocol):
    """What an API may remember of a session: conversations by the id of the answer that ended them."""

    conversations: dict[str, list[Message]]


class Api(Protocol):
    """One provider's API: requests in, answers out, as JSON or as events."""

    keep_alive: bytes

    def parse(self, body: Any, session: Conversations) -> Ask:
        """What a request asks.

        Raises:
            ApiError: something in it is wrong or not supported.
        """
        ...

    def reply(self, answer: Answer, ask: Ask, session: Conversations) -> Json:
        """The answer as one object."""
        ...

    def events(self, answer: Answer, ask: Ask, session: Conversations) -> Iterator[bytes]:
        """The answer as server-sent events."""
        ...

    def error(self, error: ApiError) -> Json:
        """The error as the provider's clients expect it."""
        ...

    def error_event(self, error: ApiError) -> bytes:
        """An error after the stream has begun."""
        ...

    def status(self, error: ApiError) -> int:
        """HTTP status of the error, by the provider's own numbers."""
        ...


def event(data: Mapping[str, Any], *, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


def pieces(text: str) -> Iterator[str]:
    """A text in parts of a few words, as streams have them."""
    size = 64
    for start in range(0, len(text), size):
        yield text[start : start + size]
