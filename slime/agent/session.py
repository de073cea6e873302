"""A session: one execution's agent, its address and key at the endpoint, and every token it caused."""

import asyncio
import contextvars
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from slime.agent.answering import as_answer, read_text, request_params
from slime.agent.asked import Answer, ApiError, Ask, assistant_message
from slime.agent.policy import settle
from slime.agent.samples import empty, samples_of
from slime.agent.server import endpoint
from slime.agent.tree import Exchange, Tree
from slime.data.chat import Message
from slime.data.sample import Sample
from slime.engines.request_scope import current_scope
from slime.errors import DataError, EngineError, EngineProtocolError
from slime.rollout.generate import generate
from slime.rollout.loop import cancel
from slime.rollout.state import GenerateState

logger = logging.getLogger(__name__)

Status = Sample.Status


@asynccontextmanager
async def agent_session(
    args: Any,
    sample: Sample,
    sampling_params: Mapping[str, Any],
    *,
    evaluation: bool = False,
) -> AsyncGenerator["Session"]:
    """A session for one call of a custom generate function; its requests end with the block.

    Args: as the function got them.

    Example:
        async with agent_session(args, sample, sampling_params) as session:
            client = AsyncOpenAI(base_url=session.openai_base_url, api_key=session.api_key)
            await run_agent(client, sample.prompt)
        return session.samples()
    """
    session = Session(args, sample, sampling_params, evaluation=evaluation)
    async with endpoint(args.agent_host, args.agent_port) as server:
        server.sessions[session.id] = session
        session.set_address(server.address)
        try:
            yield session
        finally:
            del server.sessions[session.id]
            await session.close()


class Session:
    """What one agent gets; made by `agent_session`.

    Attributes:
        id: part of the address.
        api_key: of this session alone; the agent sends it as it would a provider's.
        openai_base_url: for clients of OpenAI's API, chat completions and responses.
        anthropic_base_url: for clients of Anthropic's API.
        model: a name for clients that want one; any other does as well.
        args: the run's flat namespace, with what --custom-config-path has.
        sample: the execution's.
        evaluation: nothing of it trains.
        tree: its exchanges.
        conversations: of OpenAI's responses, by id, without their instructions.
        is_aborted: the round became full while the agent ran, and a request of it was cut or refused.
        fault: what nobody foresaw while a request was answered; `samples` raises it.
        overridden: how often the run's sampling parameters went before a request's, by name.
    """

    def __init__(
        self,
        args: Any,
        sample: Sample,
        sampling_params: Mapping[str, Any],
        *,
        evaluation: bool = False,
    ) -> None:
        self.id = secrets.token_hex(8)
        self.api_key = secrets.token_hex(24)
        self.openai_base_url = self.anthropic_base_url = ""
        self.sample = sample
        self.evaluation = evaluation
        self.model: str = args.model_name or "policy"
        self.conversations: dict[str, list[Message]] = {}
        self.is_aborted = False
        self.fault: Exception | None = None
        self.overridden: Counter[str] = Counter()
        self.args = args
        self._params = dict(sampling_params)
        self._state = GenerateState(args)
        self.tree = Tree(
            self._state.tokenizer,
            template_kwargs=sample.apply_chat_template_kwargs,
            where=f"sample {sample.index}",
        )
        # Requests come in tasks of the server; they belong to this execution: its seeds and counts.
        self._context = contextvars.copy_context()
        self._running: set[asyncio.Task[Any]] = set()
        self._is_open = True
        self._samples: list[Sample] | None = None

    def set_address(self, address: str) -> None:
        """The endpoint listens at `http://host:port`."""
        self.anthropic_base_url = f"{address}/s/{self.id}"
        self.openai_base_url = f"{self.anthropic_base_url}/v1"

    # --- what it came to ---

    def samples(self) -> list[Sample]:
        """What a custom generate function returns: one Sample for each branch of the conversation.

        One branch becomes the execution's own sample; several are that one and siblings of it, the one
        with the latest answer last. Tokens that branches share train in the first of them. After an
        abort it is the sample alone, empty and ABORTED: a later round begins it afresh.

        Raises:
            DataError: the agent asked nothing.
            Exception: the session's `fault`.
        """
        if self.fault is not None:
            raise self.fault
        if self._samples is not None:
            return self._samples
        if self.is_aborted:
            empty(self.sample)
            self.sample.status = Status.ABORTED
            return [self.sample]
        if not self.tree.exchanges:
            raise DataError(
                f"sample {self.sample.index}: the agent ended without an answer of the model; does it "
                "use session.openai_base_url or session.anthropic_base_url, and session.api_key?"
            )
        self._samples = samples_of(self.args, self._state.tokenizer, self.tree, self.sample)
        return self._samples

    def last_sample(self) -> Sample:
        """The branch with the latest answer, which is what counts in an evaluation.

        Raises:
            DataError: as `samples`.
        """
        return self.samples()[-1]

    def failed(self, fault: Exception) -> ApiError:
        """What an agent is told of a fault; its execution fails with it, whatever the agent makes of it."""
        logger.error("sample %s: a request of its agent failed", self.sample.index, exc_info=fault)
        self.fault = fault
        return ApiError(f"{type(fault).__name__}: {fault}", status=500, is_final=True)

    async def close(self) -> None:
        """End the session: requests under way end, later ones are refused."""
        self._is_open = False
        await cancel(self._running)

    # --- one request ---

    async def answer(self, ask: Ask) -> Answer:
        """The model's answer to a request, kept as an exchange.

        Raises:
            ApiError: the request is refused, or the engines gave no answer.
        """
        self._check_open()
        settled = settle(self._params, ask.sampling, self.args.agent_sampling)
        exchange = self._placed(ask)
        exchange.trains = settled.is_run or self.evaluation
        exchange.answer = self._sample_for(exchange)
        room = self._room(exchange, ask.max_tokens)
        if room == 0:
            return self._without_room(exchange)
        params = request_params(settled.params, ask, room)
        if ask.seed is not None:
            params["sampling_seed"] = self._context.run(_derived_seed, ask.seed)
        await self._generate(exchange.answer, params)
        if exchange.answer.status is Status.ABORTED:
            self._check_open()
            raise ApiError("the engine cut the answer short; ask again", status=503)
        overridden = settled.differing if self.args.agent_sampling == "run" else ()
        self._note_overridden(overridden)
        return self._kept(exchange, ask, overridden)

    def count_tokens(self, ask: Ask) -> int:
        """Prompt tokens that a request would have.

        Raises:
            ApiError: the chat template refuses its messages.
        """
        return len(self._placed(ask).prompt)

    def _check_open(self) -> None:
        """Nothing, while requests are answered.

        Raises:
            ApiError: the round is full, or the session has ended.
        """
        if self._is_open and self._state.aborted:
            self.is_aborted = True
        if self.is_aborted or not self._is_open:
            raise ApiError(
                "the round is full: this execution was cut, and begins afresh in a later round",
                status=503,
                code="round_is_full",
                is_final=True,
            )

    def _placed(self, ask: Ask) -> Exchange:
        try:
            return self.tree.place(ask.messages, ask.tools)
        except DataError as error:
            raise ApiError(str(error), param="messages", code="invalid_messages") from error

    def _room(self, exchange: Exchange, max_tokens: int | None) -> int | None:
        """Tokens the answer may have; None: as many as the engine takes."""
        args, size = self.args, len(exchange.prompt)
        context = args.eval_max_context_len if self.evaluation else None
        limits = [
            (self._params.get("max_new_tokens"), size - len(exchange.root.told)),
            (context or args.rollout_max_context_len or self._state.context_length, size),
            (max_tokens, 0),
        ]
        rooms = [max(limit - used, 0) for limit, used in limits if limit is not None]
        return min(rooms, default=None)

    def _sample_for(self, exchange: Exchange) -> Sample:
        """A sample for `generate`, with the execution's number and routing key."""
        own = self.sample
        return Sample(
            group_index=own.group_index,
            index=own.index,
            tokens=list(exchange.prompt),
            session_id=own.session_id,
        )

    async def _generate(self, sample: Sample, params: dict[str, Any]) -> None:
        work = generate(self.args, sample, params)
        task = asyncio.create_task(work, context=self._context.copy())
        self._running.add(task)
        try:
            await task
        except EngineProtocolError as error:
            logger.warning("sample %s: %s", sample.index, error)
            raise ApiError(f"the engine refused: {error}", status=500, is_final=True) from error
        except EngineError as error:
            logger.warning("sample %s: %s", sample.index, error)
            raise ApiError(str(error), status=503) from error
        finally:
            self._running.discard(task)

    def _without_room(self, exchange: Exchange) -> Answer:
        """An empty answer that ended for its length."""
        exchange.answer.status = Status.TRUNCATED
        answer = as_answer(exchange.answer)
        if exchange.parent is not None:
            exchange.parent.is_full = True
        else:
            exchange.message = assistant_message("")
            self.tree.add(exchange)
        return answer

    def _kept(self, exchange: Exchange, ask: Ask, overridden: tuple[str, ...]) -> Answer:
        text = read_text(self._state.tokenizer, exchange.answer, ask)
        answer = as_answer(exchange.answer, text, overridden)
        exchange.message = assistant_message(text.content, text.calls)
        self.tree.add(exchange)
        scope = self._context.run(current_scope)
        if scope is not None and exchange.parent is not None:
            scope.usage.tool_calls += exchange.num_results
        return answer

    def _note_overridden(self, names: tuple[str, ...]) -> None:
        for name in names:
            if not self.overridden[name]:
                logger.debug("sample %s: the run's %s holds", self.sample.index, name)
            self.overridden[name] += 1


def _derived_seed(seed: int) -> int:
    scope = current_scope()
    return seed if scope is None or scope.seeds is None else scope.seeds.derived(seed)
