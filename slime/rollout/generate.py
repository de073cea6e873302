"""One turn of the engine for one sample, or for a whole untouched group in one request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from slime.config.routing import looks_at_sessions
from slime.data.chat import render, token_ids
from slime.data.sample import Sample
from slime.data.versions import last_begin
from slime.engines.generated import Limits, output_ids
from slime.errors import ConfigError, DataError, EngineError, EngineProtocolError
from slime.rollout.continuing import Cuts, can_go_on, cut_at_stop, rest_params
from slime.rollout.state import GenerateState

Status = Sample.Status

# The most tokens in the answers of one request to SGLang: 0.4 MB of JSON with log-probs, which take the event loop some
# milliseconds. Beside longer answers the cost of a request is small, and none has to wait for the longest of its group.
SHARED_TOKENS = 8_192


async def generate(args: Any, sample: Sample, sampling_params: Mapping[str, Any]) -> Sample:
    """`sample` with one answer of the engine appended; a partial sample goes on where it stopped.

    Token in, token out: the engine gets ids, and the ids in its answer are appended as they are.
    An answer that an engine cuts short in the middle of a round, as SGLang does when its weights
    change, goes on at once (`continuing.py`).

    Args:
        sampling_params: for `/generate`; `max_new_tokens` bounds the whole response, so what the
            sample already has is taken off.

    Raises:
        EngineError: no usable answer within `args.request_timeout_s`.
    """
    state = GenerateState(args)
    set_prompt_ids(state, sample)
    start, cuts = _Start.of(sample), Cuts(sample.response_length)
    while True:
        params = rest_params(sampling_params, sample.response_length - start.length)
        await _ask(args, state, sample, params, start)
        if sample.status is not Status.ABORTED or state.aborted or not can_go_on(params):
            return sample
        if not await cuts.wait(sample.response_length) or state.aborted:
            return sample
        state.num_continued += 1


@dataclass(frozen=True)
class _Start:
    """Where `generate` found a sample.

    Attributes:
        length: response tokens it had.
        begin: first response token of the answer that is being written, `length` unless an earlier
            round began it.
        text: of the response before `begin`; None: to be decoded.
    """

    length: int
    begin: int
    text: str | None

    @classmethod
    def of(cls, sample: Sample) -> "_Start":
        length = sample.response_length
        if sample.status is Status.ABORTED:
            return cls(length, last_begin(sample.version_spans, length), None)
        return cls(length, length, sample.response)


async def _ask(
    args: Any, state: GenerateState, sample: Sample, params: dict[str, Any], start: _Start
) -> None:
    """Append one request's answer."""
    if sample.response_length and "max_new_tokens" in params:
        params["max_new_tokens"] -= sample.response_length
        if params["max_new_tokens"] <= 0:
            sample.status = Status.TRUNCATED
            return
    payload = _payload(args, sample.tokens, params)
    async with state.asking():
        sent_under = state.weight_version
        reply = await state.client.generate(payload, headers=routing_headers(args, sample))
    answer = _answers(state, reply, expected=1)[0]
    written = sample.tokens[sample.prompt_length + start.begin :]
    if written and (stops := params.get("stop")):
        stops = [stops] if isinstance(stops, str) else stops
        answer = cut_at_stop(answer, written, stops, state.tokenizer)
    _append_answer(args, state, sample, answer, _limits(state, params), sent_under)
    if written:
        # A character may have been cut in two: decode what was written as one piece.
        first = 0 if start.text is None else start.begin
        ids = sample.tokens[sample.prompt_length + first :]
        skips = bool(params.get("skip_special_tokens"))
        text = state.tokenizer.decode(ids, skip_special_tokens=skips)
        sample.response = (start.text or "") + text


def can_share_request(args: Any, group: Sequence[Sample], params: Mapping[str, Any]) -> bool:
    """Whether `generate_group` can serve `group` with these sampling parameters.

    True for several samples that ask the same prompt for the first time, on engines that take one
    seed per answer; on those whose answers depend on no seed for short answers, see SHARED_TOKENS.
    """
    if len(group) < 2 or args.custom_generate_function_path:
        return False
    # Facts the rollout manager learns from the engines; absent where somebody else made args.
    facts, longest = vars(args), params.get("max_new_tokens")
    is_short = longest is not None and len(group) * longest <= SHARED_TOKENS
    if not facts.get("engine_supports_group_seeds") and (
        facts.get("engine_heeds_seeds", True) or not is_short
    ):
        return False
    first = group[0]
    return all(
        sample.status is Status.PENDING
        and sample.response_length == 0
        and sample.index is not None
        and sample.prompt == first.prompt
        and sample.tokens == first.tokens
        and sample.generate_function_path is None
        and sample.multimodal_inputs is None
        for sample in group
    )


async def generate_group(
    args: Any, group: Sequence[Sample], sampling_params: Mapping[str, Any], seeds: Sequence[int]
) -> None:
    """Append one answer to each sample of `group`, all asked for in one request with `n` answers.

    The engine prefills the prompt once, and HTTP, JSON and the router are paid once per group.

    Args:
        seeds: one per sample; sample i gets the tokens it would get alone with seed i. Not sent to
            engines that heed none.

    Raises:
        EngineError: no usable answer within `args.request_timeout_s`; samples that got none are
            still pending.
    """
    state = GenerateState(args)
    for sample in group:
        set_prompt_ids(state, sample)
    params = {**sampling_params, "n": len(group)}
    payload = _payload(args, group[0].tokens, params)
    if vars(args).get("engine_supports_group_seeds"):
        payload["sampling_seeds"] = list(seeds)
    async with state.asking():
        sent_under = state.weight_version
        reply = await state.client.generate(payload, headers=routing_headers(args, group[0]))
    answers = _answers(state, reply, expected=len(group))
    limits = _limits(state, params)
    for sample, answer in zip(group, answers, strict=True):
        _append_answer(args, state, sample, answer, limits, sent_under)


def set_prompt_ids(state: GenerateState, sample: Sample) -> None:
    """Fill `tokens` of a sample that nobody tokenised; those of the data source come with ids."""
    if sample.multimodal_inputs:
        raise ConfigError(
            "the default generate function sends token ids only; give "
            "--custom-generate-function-path for prompts with images"
        )
    if sample.tokens:
        return
    text = sample.prompt
    if not isinstance(text, str):
        text = render(
            state.tokenizer,
            text,
            where=f"sample {sample.index}",
            tools=sample.metadata.get("tools"),
            template_kwargs=sample.apply_chat_template_kwargs,
        )
    sample.tokens = token_ids(state.tokenizer, text)


def routing_headers(args: Any, sample: Sample) -> dict[str, str]:
    """The header by which the router keeps the turns of one sample on one engine.

    Only where it routes by keys: under prefix_hash a key would take the place of the prefix, which
    brings the samples of a group together.
    """
    if looks_at_sessions(args.router_argv) and sample.session_id:
        return {"X-SMG-Routing-Key": sample.session_id}
    return {}


def _payload(args: Any, input_ids: list[int], params: dict[str, Any]) -> dict[str, Any]:
    payload: dict[str, Any] = {
        "input_ids": input_ids,
        "sampling_params": params,
        "return_logprob": True,
    }
    if args.use_rollout_routing_replay:
        payload["return_routed_experts"] = True
    return payload


def _answers(state: GenerateState, reply: Any, *, expected: int) -> list[dict[str, Any]]:
    answers = cast(list[dict[str, Any]], reply if isinstance(reply, list) else [reply])
    if len(answers) != expected:
        raise EngineProtocolError(
            f"POST {state.router_url}/generate gave {len(answers)} answers, expected {expected}"
        )
    return answers


def _limits(state: GenerateState, params: Mapping[str, Any]) -> Limits:
    return Limits(max_new_tokens=params.get("max_new_tokens"), vocab_size=state.vocab_size)


def _append_answer(
    args: Any,
    state: GenerateState,
    sample: Sample,
    answer: Mapping[str, Any],
    limits: Limits,
    sent_under: str | None,
) -> None:
    """Append what an engine answered.

    Args:
        sent_under: newest weight version that was known when the request left.
    """
    where = f"POST {state.router_url}/generate"
    tokens = output_ids(answer, limits, where=where)
    meta = state.with_versions(answer["meta_info"], sent_under)
    try:
        sample.append_response_tokens(
            args, tokens=tokens, meta_info=meta, text=answer.get("text") or ""
        )
    except (DataError, EngineError):
        raise
    except (ValueError, TypeError, OverflowError) as error:  # routed experts that do not decode
        raise EngineProtocolError(f"{where}: the answer cannot be read: {error}") from error
    state.record(answer["meta_info"])
