"""Which tokens of a conversation train: the assistant's turns, each with its end token.

A conversation is rendered piece by piece: everything before the first assistant turn as it is, then
each assistant turn, and each run of user and tool messages between two of them, behind one stand-in
user message whose own text is cut off again. So each assistant turn looks as it did when it was the
last one: templates that drop the thinking of earlier turns keep it here, and the tokens only ever
grow, as they do in a rollout. The pieces put together are compared with the template's rendering of
the whole, and a difference the type does not explain is an error, never a shifted mask.

| type           | templates                    | allowed difference to the whole rendering       |
|----------------|------------------------------|-------------------------------------------------|
| `qwen`         | ChatML, Qwen2, Qwen2.5       | none                                            |
| `qwen3`        | Qwen3                        | thinking kept in every assistant turn           |
| `qwen3_5`      | Qwen3.5 (prompt opens <think>) | the same; the opening <think> does not train  |
| `distill_qwen` | DeepSeek-R1-Distill-Qwen     | the same; the answer is written as it stands    |
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from slime.data.chat import Message, Tokenizer, as_messages, batch_token_ids, render
from slime.errors import DataError

LossMaskType = Literal["qwen", "qwen3", "qwen3_5", "distill_qwen"]

_STAND_IN: Message = {"role": "user", "content": "-"}
_STEP_MASK = "step_loss_mask"
_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_WHERE = "conversation"


@dataclass(frozen=True)
class _Piece:
    text: str
    is_answer: bool = False
    trains: bool = False


class MultiTurnLossMaskGenerator:
    """Token ids and loss masks of conversations, for one tokenizer and template type.

    Args:
        tokenizer: with a chat template.
        tokenizer_type: see the table above; `--loss-mask-type`.
        template_kwargs: variables for the template, e.g. {"enable_thinking": False}.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokenizer_type: LossMaskType = "qwen",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tokenizer_type: LossMaskType = tokenizer_type
        self.template_kwargs = dict(template_kwargs or {})

    def get_loss_mask(
        self, messages: list[Message], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """(token ids [S], mask [S]) of a conversation; 1 = written by the assistant.

        A message with `"step_loss_mask": 0` does not train; its tokens stay the same.

        Raises:
            DataError: the conversation begins with the assistant, or the template does something
                that the type does not allow.
        """
        trains = [message.get(_STEP_MASK, 1) == 1 for message in messages]
        plain = [
            {key: value for key, value in message.items() if key != _STEP_MASK}
            for message in as_messages(messages, where=_WHERE)
        ]
        view = _View(self, tools)
        pieces = list(_merged(view.pieces(plain, trains)))
        self._verify("".join(piece.text for piece in pieces), view.render(plain))
        ids = batch_token_ids(self.tokenizer, [piece.text for piece in pieces])
        mask = [
            int(piece.trains) for piece, tokens in zip(pieces, ids, strict=True) for _ in tokens
        ]
        return [token for tokens in ids for token in tokens], mask

    def get_response_lengths(self, loss_masks: Sequence[Sequence[int]]) -> list[int]:
        """Tokens from the first that trains to the end, for each mask; 0 if none trains."""
        return [len(mask) - list(mask).index(1) if 1 in mask else 0 for mask in loss_masks]

    def get_text_from_loss_mask(
        self, token_ids: Sequence[int], loss_mask: Sequence[int]
    ) -> list[str]:
        """Text of each run of training tokens."""
        runs = groupby(zip(token_ids, loss_mask, strict=True), key=lambda pair: pair[1])
        return [
            self.tokenizer.decode([token for token, _ in run]) for trains, run in runs if trains
        ]

    def _verify(self, assembled: str, whole: str) -> None:
        if self.tokenizer_type != "qwen":
            assembled, whole = _without_thinking(assembled), _without_thinking(whole)
        if assembled == whole:
            return
        at = next(
            (i for i, pair in enumerate(zip(assembled, whole, strict=False)) if len(set(pair)) > 1),
            min(len(assembled), len(whole)),
        )
        raise DataError(
            f"the chat template does not only append (--loss-mask-type {self.tokenizer_type}): turn"
            f" by turn it writes {assembled[at : at + 40]!r}, for the whole conversation "
            f"{whole[at : at + 40]!r}; qwen3 allows for templates that drop earlier thinking"
        )


class _View:
    """The template with one set of tools, as a function from a message to its own text."""

    def __init__(self, generator: MultiTurnLossMaskGenerator, tools: Sequence[Any] | None) -> None:
        self.generator = generator
        self.tools = tools
        self.before = self.render([_STAND_IN])
        self.opening = self._after(self.render([_STAND_IN], opened=True), self.before)

    def render(self, messages: Sequence[Message], *, opened: bool = False) -> str:
        return render(
            self.generator.tokenizer,
            messages,
            where=_WHERE,
            tools=self.tools,
            add_generation_prompt=opened,
            template_kwargs=self.generator.template_kwargs,
        )

    def pieces(self, messages: list[Message], trains: list[bool]) -> Iterator[_Piece]:
        """The conversation as text that trains and text that does not, in order."""
        runs = groupby(zip(messages, trains, strict=True), key=lambda pair: _is_answer(pair[0]))
        for number, (is_answer, run) in enumerate(runs):
            pairs = list(run)
            if is_answer and number == 0:
                raise DataError("a conversation must begin with a system or user message")
            if is_answer:
                for message, does_train in pairs:
                    yield from self._answer(message, does_train)
            elif number == 0:
                yield _Piece(self.render([message for message, _ in pairs]))
            else:
                yield _Piece(self._own_text([message for message, _ in pairs]))

    def _answer(self, message: Message, trains: bool) -> Iterator[_Piece]:
        if self.generator.tokenizer_type == "distill_qwen":
            opening, body = self._raw_answer(message)
        else:
            opening = self.opening
            body = self._after(self._own_text([message]), opening)
        written, rest = self._split_end(body)
        yield _Piece(opening)
        yield _Piece(written, is_answer=True, trains=trains)
        yield _Piece(rest)

    def _raw_answer(self, message: Message) -> tuple[str, str]:
        """Opening and text of an answer whose template would cut the thinking out."""
        content, think = str(message["content"]), "<think>"
        if message.get("tool_calls"):
            raise DataError("--loss-mask-type distill_qwen has no form for tool calls")
        head, opened, _ = self.opening.rpartition(think)
        if not opened:
            return self.opening, content + (self.generator.tokenizer.eos_token or "")
        if "</think>" not in content:
            return head, content + (self.generator.tokenizer.eos_token or "")
        content = content.lstrip().removeprefix(think).lstrip("\n")
        return self.opening, content + (self.generator.tokenizer.eos_token or "")

    def _own_text(self, messages: list[Message]) -> str:
        return self._after(self.render([_STAND_IN, *messages]), self.before)

    def _after(self, text: str, start: str) -> str:
        if not text.startswith(start):
            raise DataError(
                f"--loss-mask-type {self.generator.tokenizer_type} does not fit this chat template "
                f"or answer: expected text that begins with {start[-80:]!r}, found "
                f"{text[max(len(start) - 80, 0) :][:120]!r}"
            )
        return text[len(start) :]

    def _split_end(self, body: str) -> tuple[str, str]:
        """The answer with its end token, and the white space the template writes after it."""
        written = body.rstrip()
        if written.endswith(tuple(self.generator.tokenizer.all_special_tokens)):
            return written, body[len(written) :]
        return body, ""


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def _merged(pieces: Iterator[_Piece]) -> Iterator[_Piece]:
    """The pieces with everything between two answers joined, to be tokenised as one text.

    An answer stays apart, trained or not: in a rollout its tokens are the model's own.
    """
    text = ""
    for piece in pieces:
        if piece.is_answer:
            if text:
                yield _Piece(text)
            yield piece
            text = ""
        else:
            text += piece.text
    if text:
        yield _Piece(text)


def _without_thinking(text: str) -> str:
    """`text` without thinking and white space: what a template must not change."""
    return "".join(_THINKING.sub("", text).split())
