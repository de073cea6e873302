"""From a parsed call to requests for the scheduler, and from ended requests to JSON answers."""

import itertools
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from slime.engines.embedded.detokenize import Detokenizer, StopStrings
from slime.engines.embedded.requests import Request
from slime.engines.embedded.seeds import child_seed
from slime.engines.protocol import GenerateCall, Json, PromptRequest, SamplingParams
from slime.errors import EngineProtocolError


@dataclass(kw_only=True)
class RequestMaker:
    """Turns prompts into requests this model can run.

    Attributes:
        eos_ids: tokens that end every answer unless it ignores them.
        detokenizer: None without a tokenizer; text and stop strings are then refused.
        random_seed: for requests without a seed, together with a count of them.
    """

    vocab_size: int
    context_length: int
    eos_ids: tuple[int, ...]
    detokenizer: Detokenizer | None
    random_seed: int
    _num_unseeded: int = 0
    # Not a uuid per request: each one is a system call, which hands the interpreter to the engine.
    _own_prefix: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    _counter: Iterator[int] = field(default_factory=itertools.count)

    def requests(self, call: GenerateCall) -> list[Request]:
        """One request per answer: the first prompt's answers, then the second's.

        Raises:
            EngineProtocolError: prompt and answer do not fit into the context, ids beyond the
                vocabulary, or text without a tokenizer.
        """
        made: list[Request] = []
        for prompt in call.prompts:
            made += self._of_prompt(prompt, call.stream)
        return made

    def _of_prompt(self, prompt: PromptRequest, stream: bool) -> Iterable[Request]:
        params = prompt.params
        ids = np.array(self._ids(prompt), dtype=np.int64)
        start_len = self._check(prompt, ids)
        room = self.context_length - len(ids)
        rid = prompt.rid or f"{self._own_prefix}{next(self._counter):x}"
        stop_ids = tuple(sorted({*self.eos_ids, *params.stop_token_ids}))
        for index, seed in enumerate(self._seeds(prompt)):
            yield Request(
                rid=rid if params.n == 1 else f"{rid}_{index}",
                prompt=ids,
                params=params,
                seed=seed,
                stop_ids=stop_ids,
                max_out=room if params.max_new_tokens is None else min(room, params.max_new_tokens),
                return_logprob=prompt.return_logprob,
                logprob_start_len=start_len,
                stream=stream,
                stop_strings=self._stop_strings(params),
            )

    def _ids(self, prompt: PromptRequest) -> Iterable[int]:
        if prompt.input_ids is not None:
            return prompt.input_ids
        if self.detokenizer is None:
            raise EngineProtocolError(
                "`text` needs a tokenizer, and this engine has none; send ids"
            )
        return self.detokenizer.encode(prompt.text or "")

    def _check(
        self, prompt: PromptRequest, ids: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    ) -> int:
        """The prompt position from which log-probs are wanted, -1 for none."""
        if len(ids) == 0:
            raise EngineProtocolError("the prompt has no tokens")
        # SGLang refuses both, where a shorter answer would be possible too.
        if len(ids) >= self.context_length:
            raise EngineProtocolError(
                f"the prompt has {len(ids)} tokens and leaves no room in the context of "
                f"{self.context_length}"
            )
        wanted = prompt.params.max_new_tokens or 0
        if prompt.params.is_length_given and len(ids) + wanted > self.context_length:
            raise EngineProtocolError(
                f"the prompt has {len(ids)} tokens and max_new_tokens is {wanted}, together more "
                f"than the context of {self.context_length}; null means: until it is full"
            )
        if int(ids.max()) >= self.vocab_size:
            raise EngineProtocolError(
                f"token id {int(ids.max())} is beyond the vocabulary of {self.vocab_size}"
            )
        start_len = prompt.logprob_start_len if prompt.return_logprob else -1
        if start_len > len(ids):
            raise EngineProtocolError(
                f"logprob_start_len {start_len} is beyond the prompt's {len(ids)} tokens"
            )
        return -1 if start_len == len(ids) else start_len

    def _seeds(self, prompt: PromptRequest) -> tuple[int, ...]:
        if prompt.seeds:
            return prompt.seeds
        seed = prompt.params.sampling_seed
        if seed is None:
            seed = child_seed(self.random_seed, self._num_unseeded)
            self._num_unseeded += 1
        if prompt.params.n == 1:
            return (seed,)
        return tuple(child_seed(seed, index) for index in range(prompt.params.n))

    def _stop_strings(self, params: SamplingParams) -> StopStrings | None:
        stops = tuple(filter(None, params.stop))
        if not stops:
            return None
        if self.detokenizer is None:
            raise EngineProtocolError("`stop` needs a tokenizer, and this engine has none")
        return StopStrings(self.detokenizer, stops)


def answer(request: Request, detokenizer: Detokenizer | None) -> Json:
    """The JSON object of a request, ended or streaming."""
    ids, log_probs = request.output_ids, request.output_log_probs
    # A streaming request goes on while this runs: its lists are replaced, never changed.
    count = min(len(ids), len(log_probs))
    ids, log_probs = ids[:count], log_probs[:count]
    text = ""
    if detokenizer is not None:
        text = detokenizer.answer_text(ids, request.params, request.finish)
    admitted = request.admitted_at or request.finished_at or request.created_at
    meta: Json = {
        "id": request.rid,
        "finish_reason": request.finish,
        "prompt_tokens": len(request.prompt),
        "completion_tokens": count,
        "cached_tokens": request.cached_tokens,
        "weight_version": request.weight_version,
        "queue_time": admitted - request.created_at,
    }
    if request.finished_at is not None:
        meta["e2e_latency"] = request.finished_at - request.created_at
    if request.versions:
        # [version, first answer token of it]: several, when weights came in the middle.
        meta["weight_versions"] = request.versions
    if request.return_logprob:
        meta["output_token_logprobs"] = [
            [log_prob, token, None] for log_prob, token in zip(log_probs, ids, strict=True)
        ]
        meta["input_token_logprobs"] = _input_log_probs(request)
    return {"text": text, "output_ids": ids, "meta_info": meta}


def _input_log_probs(request: Request) -> list[list[float | int | None]]:
    """Log-probs of the prompt from the asked position on; the first has none, as in SGLang."""
    start = request.logprob_start_len
    if start < 0:
        return []
    tokens = request.prompt[start:].tolist()
    scores = request.input_log_probs or []
    return [
        [None, tokens[0], None],
        *([score, token, None] for score, token in zip(scores, tokens[1:], strict=False)),
    ]
