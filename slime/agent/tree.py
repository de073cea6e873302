"""The exchanges of a session as a tree: which conversation a request goes on with, and in which tokens.

An agent sends the whole conversation with each request. Where it begins with one that an answer of ours
ended, word for word, the request's ids are those that were read and written then, and the new messages as
the chat template writes them, tokenised alone. Where the agent has changed what came before, a new branch
begins: from the last answer that is still as it was, or from nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, cast

from slime.data.chat import Message, Tokenizer, render, token_ids
from slime.data.next_turn import end_of_answer, text_until_next_answer
from slime.data.sample import Sample
from slime.errors import DataError


@dataclass(eq=False)
class Exchange:
    """One answer, and what was said since the one before it.

    Attributes:
        parent: the exchange it goes on from; None: the whole prompt is `told`.
        told: ids and text between the parent's answer and this one.
        prompt: all ids in front of the answer; empty once that is there.
        digest: of the conversation in front of the answer.
        answer: as `slime.rollout.generate.generate` left it; in the tree its `tokens` are the answer's alone.
        message: as the endpoint gave it to the agent.
        trains: its tokens were sampled as the run samples.
        num_results: tool results among what was said.
        is_full: an agent wanted to go on from here, and there was no room.
    """

    parent: "Exchange | None"
    told: list[int]
    told_text: str
    prompt: list[int]
    digest: bytes
    answer: Sample = field(default_factory=Sample)
    message: Message = field(default_factory=Message)
    trains: bool = True
    num_results: int = 0
    is_full: bool = False

    @property
    def root(self) -> "Exchange":
        """The first exchange of its conversation."""
        return self if self.parent is None else self.parent.root

    def path(self) -> list["Exchange"]:
        """From the root to this one."""
        line: list[Exchange] = []
        one: Exchange | None = self
        while one is not None:
            line.append(one)
            one = one.parent
        return line[::-1]

    def ids(self) -> list[int]:
        """Of the whole conversation up to this answer, which must be in the tree."""
        return [token for one in self.path() for token in (*one.told, *one.answer.tokens)]


class Tree:
    """The exchanges of one session.

    Args:
        template_kwargs: variables of the chat template.
        where: names the session in messages.

    Attributes:
        exchanges: in the order their answers came.
        num_rendered: requests that were rendered as a whole, the first one among them.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, template_kwargs: Mapping[str, Any], where: str
    ) -> None:
        self.exchanges: list[Exchange] = []
        self.num_rendered = 0
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs)
        self._where = where
        # Digest of a conversation that ends with an answer -> the exchanges with that answer.
        self._ends: dict[bytes, list[Exchange]] = {}

    def place(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Exchange:
        """An exchange for a request, without an answer yet; not in the tree before `add`.

        Raises:
            DataError: the chat template refuses the messages.
        """
        digest, parent, known = _start(tools), None, 0
        for number, message in enumerate(messages, start=1):
            as_answer = _after(digest, _trimmed(message))
            if message["role"] == "assistant" and (ends := self._ends.get(as_answer)):
                digest, parent, known = as_answer, _best(ends, message), number
            else:
                digest = _after(digest, message)
        if parent is not None:
            try:
                return self._next(parent, messages[known:], tools, digest)
            except DataError:
                pass  # this template cannot be continued: rendered as a whole
        self.num_rendered += 1
        text = render(
            self._tokenizer,
            messages,
            where=self._where,
            tools=tools,
            template_kwargs=self._template_kwargs,
        )
        ids = token_ids(self._tokenizer, text)
        return Exchange(None, ids, text, ids, digest)

    def add(self, exchange: Exchange) -> None:
        """Keep an exchange that has its answer.

        Its prompt is dropped, as those before it have it in parts: else a session would need memory by
        the square of its turns.
        """
        answer = exchange.answer
        answer.tokens = answer.tokens[answer.prompt_length :]
        exchange.prompt = []
        self.exchanges.append(exchange)
        end = _after(exchange.digest, _trimmed(exchange.message))
        self._ends.setdefault(end, []).append(exchange)

    def leaves(self) -> list[Exchange]:
        """The exchanges that none goes on from, in the order their answers came."""
        parents = {exchange.parent for exchange in self.exchanges}
        return [exchange for exchange in self.exchanges if exchange not in parents]

    def _next(
        self,
        parent: Exchange,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        digest: bytes,
    ) -> Exchange:
        text = text_until_next_answer(
            self._tokenizer, messages, tools=tools, template_kwargs=self._template_kwargs
        )
        text = text.removeprefix(end_of_answer(self._tokenizer, parent.answer.tokens))
        ids = token_ids(self._tokenizer, text)
        num_results = sum(message["role"] == "tool" for message in messages)
        prompt = parent.ids() + ids
        return Exchange(parent, ids, text, prompt, digest, num_results=num_results)


def _start(tools: Sequence[Any] | None) -> bytes:
    return blake2b(_data(tools or []), digest_size=16).digest()


def _after(digest: bytes, message: Message) -> bytes:
    """Digest of a conversation with one more message: of what a model reads of it.

    The ids of tool calls are not among that, and clients write JSON in ways of their own.
    """
    calls = cast(list[dict[str, Any]], message.get("tool_calls") or [])
    read = [
        message["role"],
        message.get("name"),
        message["content"],
        [[call["function"]["name"], call["function"]["arguments"]] for call in calls],
    ]
    return blake2b(digest + _data(read), digest_size=16).digest()


def _trimmed(message: Message) -> Message:
    """Without the space around an answer, which clients keep or not."""
    return message | {"content": message["content"].strip()}


def _data(value: Any) -> bytes:
    # Not orjson: a model may write numbers of more than 64 bits.
    return json.dumps(value, sort_keys=True).encode()


def _best(ends: Sequence[Exchange], message: Message) -> Exchange:
    """Among answers with the same words the one with these call ids; else the latest."""
    ids = _call_ids(message)
    return next((one for one in reversed(ends) if _call_ids(one.message) == ids), ends[-1])


def _call_ids(message: Message) -> list[str]:
    return [call["id"] for call in message.get("tool_calls") or []]
