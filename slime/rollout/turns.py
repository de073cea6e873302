"""Turns: an answer of several turns with tools in between, token for token as the model wrote it.

For custom generate functions:

    async def generate(args, sample, sampling_params):
        turns = Turns(args, sample, sampling_params, max_turns=4)
        while await turns.ask():
            queries = SEARCH.findall(turns.text)
            if not queries:
                break
            found = await turns.call(*(search(query) for query in queries))
            turns.tell("".join(f"<information>{text}</information>" for text in found))
        return sample
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Literal

from slime.data.chat import Message, token_ids
from slime.data.next_turn import end_of_answer, text_until_next_answer
from slime.data.sample import Sample
from slime.engines.request_scope import current_scope
from slime.engines.usage import Usage
from slime.errors import DeadlineExceeded
from slime.observability.waits import waiting
from slime.rollout.generate import generate, set_prompt_ids
from slime.rollout.loop import gather
from slime.rollout.state import GenerateState

Status = Sample.Status

# In Sample.metadata, so that a sample an abort cut short goes on in the same turn.
TURN_START = "turn_start"
ROUND_NUMBER = "round_number"
DEFAULT_TOOL_TIMEOUT_S = 60.0


class Turns:
    """The turns of one sample.

    What the model writes is appended as the ids it wrote, and trains. What is told to it is tokenised
    alone, so that no token spans the border, and does not train (loss mask 0, log-prob 0.0).

    Three limits end the sample as TRUNCATED: `max_new_tokens` of the sampling parameters bounds the
    whole response, tools included; --rollout-max-context-len (in an evaluation
    --eval-max-context-len) bounds prompt and response; `max_turns` the turns.

    With --partial-rollout a sample comes back whose round was full. The new Turns goes on where the
    old one was cut, in the middle of a turn or before one; what else a function must remember
    belongs into `sample.metadata`.

    Args:
        sample: changed in place.
        sampling_params: as the function got them.
        max_turns: answers the model may give; None: as many as fit.
        evaluation: the function's argument of that name.

    Attributes:
        text: of the model's last turn, without the token that ends it.
    """

    def __init__(
        self,
        args: Any,
        sample: Sample,
        sampling_params: Mapping[str, Any],
        *,
        max_turns: int | None = None,
        evaluation: bool = False,
    ) -> None:
        self.sample = sample
        self.text = ""
        self._args = args
        self._params = dict(sampling_params)
        self._max_turns = max_turns
        self._state = GenerateState(args)
        context = args.eval_max_context_len if evaluation else None
        self._max_context: int | None = context or args.rollout_max_context_len
        set_prompt_ids(self._state, sample)

    @property
    def number(self) -> int:
        """Turns the model has begun."""
        return self.sample.metadata.get(ROUND_NUMBER, 0)

    @property
    def room(self) -> int | None:
        """Tokens the response may still grow by, tools included; None: as many as the engine takes."""
        limits = [
            limit - size
            for limit, size in (
                (self._params.get("max_new_tokens"), self.sample.response_length),
                (self._max_context, len(self.sample.tokens)),
            )
            if limit is not None
        ]
        return max(min(limits), 0) if limits else None

    async def ask(self, **params: Any) -> bool:
        """Let the model write a turn; whether it ended it by itself, so that there may be another.

        False: the sample is TRUNCATED by one of its limits, or ABORTED as its round is full; return
        it as it is.

        Args:
            params: for this turn instead of the sampling parameters, such as `stop`;
                `max_new_tokens` bounds this turn alone.

        Raises:
            EngineError: as `generate`.
        """
        sample = self.sample
        if sample.status is not Status.ABORTED:  # else the turn that was cut goes on
            if self._max_turns is not None and self.number >= self._max_turns:
                sample.status = Status.TRUNCATED
                return False
            sample.metadata[TURN_START] = sample.response_length
            sample.metadata[ROUND_NUMBER] = self.number + 1
        if self._state.aborted:
            sample.status = Status.ABORTED
            return False
        room = self.room
        if room == 0:
            sample.status = Status.TRUNCATED
            return False
        start = sample.metadata.get(TURN_START, 0)
        await generate(self._args, sample, self._turn_params(params, room, start))
        self.text = self._text_from(start)
        return sample.status is Status.COMPLETED

    def tell(self, text: str) -> bool:
        """Append what a tool or the user said; False if it leaves no room for an answer.

        Then nothing is appended and the sample is TRUNCATED. The token that ended the model's turn
        is not repeated where `text` begins with it.
        """
        text = text.removeprefix(self._end_of_turn())
        ids = token_ids(self._state.tokenizer, text)
        room = self.room
        if room is not None and len(ids) >= room:
            self.sample.status = Status.TRUNCATED
            return False
        self.sample.append_response_tokens(self._args, tokens=ids, trainable=False, text=text)
        return True

    def tell_messages(self, messages: Sequence[Message]) -> bool:
        """As `tell`, with the text the chat template writes for `messages` and the next answer.

        As for the prompt, `sample.metadata["tools"]` and `sample.apply_chat_template_kwargs` are what
        the template gets besides.

        Raises:
            DataError: the template refuses them.
        """
        text = text_until_next_answer(
            self._state.tokenizer,
            messages,
            tools=self.sample.metadata.get("tools"),
            template_kwargs=self.sample.apply_chat_template_kwargs,
        )
        return self.tell(text)

    async def call[T](
        self,
        *calls: Coroutine[Any, Any, T],
        timeout_s: float = DEFAULT_TOOL_TIMEOUT_S,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[T | Exception]:
        """What tools give, in order; all run at the same time.

        Args:
            timeout_s: for each of them.
            errors: "raise": the first one ends the others and fails the sample; "return": it stands
                among the results, to be told to the model.

        Raises:
            DeadlineExceeded, or what the tool raised, with `errors="raise"`.
        """
        scope = current_scope()
        usage = Usage() if scope is None else scope.usage
        usage.tool_calls += len(calls)

        async def fenced(call: Coroutine[Any, Any, T]) -> T | Exception:
            try:
                return await within_deadline(call, timeout_s, f"tool {call.__qualname__}")
            except Exception as error:
                usage.tool_errors += 1
                if errors == "raise":
                    raise
                return error

        return await gather(fenced(call) for call in calls)

    def _turn_params(self, own: dict[str, Any], room: int | None, start: int) -> dict[str, Any]:
        """Parameters for `generate`, whose `max_new_tokens` bounds the whole response."""
        params, length = self._params | own, self.sample.response_length
        limits = [] if room is None else [length + room]
        if "max_new_tokens" in own:
            limits.append(start + own["max_new_tokens"])
        params.pop("max_new_tokens", None)
        return params | ({"max_new_tokens": min(limits)} if limits else {})

    def _text_from(self, start: int) -> str:
        ids = self.sample.tokens[self.sample.prompt_length + start :]
        skip = bool(self._params.get("skip_special_tokens"))
        text = self._state.tokenizer.decode(ids, skip_special_tokens=skip)
        return text.removesuffix(self._end_of_turn())

    def _end_of_turn(self) -> str:
        """The special token that the response ends with, as text; "" if it ends otherwise."""
        response = self.sample.tokens[self.sample.prompt_length :]
        return end_of_answer(self._state.tokenizer, response[-1:])


def sibling_of(sample: Sample, prompt: str | list[Message]) -> Sample:
    """A new sample of the same execution with another prompt, for a fan-out into several.

    It belongs to the same group and shares `rollout_id`, which `sample` gets too if it has none.
    """
    if sample.rollout_id is None:
        sample.rollout_id = sample.index
    return Sample(
        group_index=sample.group_index,
        index=sample.index,
        rollout_id=sample.rollout_id,
        prompt=prompt,
        label=sample.label,
        metadata={k: v for k, v in sample.metadata.items() if k not in (TURN_START, ROUND_NUMBER)},
        apply_chat_template_kwargs=dict(sample.apply_chat_template_kwargs),
        custom_rm_path=sample.custom_rm_path,
        generate_function_path=sample.generate_function_path,
        session_id=sample.session_id,
    )


async def within_deadline[T](call: Coroutine[Any, Any, T], timeout_s: float, name: str) -> T:
    """What `call` gives; it is noted as a wait for `name`.

    Raises:
        DeadlineExceeded: not within `timeout_s`; names it.
    """
    limit = asyncio.timeout(timeout_s)
    try:
        with waiting(name, "answer", deadline_s=timeout_s, warn_after_s=timeout_s / 2):
            async with limit:
                return await call
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(f"{name} gave no answer within {timeout_s:g} s") from error
