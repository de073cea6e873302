"""The text a chat template writes between two answers: end of turn, messages, opening of the next answer.

In a rollout of several turns the answers keep the tokens the model wrote. Only what stands between them
is rendered, behind stand-in messages whose own text is cut off, and appended.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from slime.data.chat import Message, Tokenizer, render
from slime.errors import DataError

_USER: Message = {"role": "user", "content": "-"}
# Letters only: no template escapes or strips them.
_MARK = "ANSWER"


def text_until_next_answer(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """What stands between the model's own words and its next ones when `messages` come between.

    It begins with the token that ends an answer; whoever appends it leaves that out where the model
    has written it.

    Args:
        messages: of tools or the user.
        tools, template_kwargs: as the prompt was rendered with.

    Raises:
        DataError: the template refuses the messages, or changes what came before them.

    Example: for ChatML and `[{"role": "tool", "content": "4"}]`
        "<|im_end|>\\n<|im_start|>tool\\n4<|im_end|>\\n<|im_start|>assistant\\n"
    """

    def rendered(*conversation: Message, opened: bool = False) -> str:
        return render(
            tokenizer,
            conversation,
            where="next turn",
            tools=tools,
            add_generation_prompt=opened,
            template_kwargs=template_kwargs,
        )

    answered = rendered(_USER, {"role": "assistant", "content": _MARK})
    _, found, ending = answered.rpartition(_MARK)
    before = rendered(_USER)
    after = rendered(_USER, *messages, opened=True)
    if not found or not after.startswith(before):
        raise DataError(
            f"next turn: this chat template cannot be continued message by message: with "
            f"{[message.get('role') for message in messages]} it writes {after[:200]!r} and not "
            f"{before[:200]!r} first; append text of your own with Turns.tell"
        )
    return ending + after[len(before) :]


def end_of_answer(tokenizer: Tokenizer, answer: Sequence[int]) -> str:
    """The special token that an answer's ids end with, as text; "" if they end otherwise."""
    if not answer:
        return ""
    last = tokenizer.decode(answer[-1:])
    return last if last in tokenizer.all_special_tokens else ""
