"""Request: one answer being written; RequestGroup: the answers of one HTTP call."""

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from slime.engines.embedded.detokenize import StopStrings
from slime.engines.protocol import Json, SamplingParams


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One answer to one prompt. Made by the server, changed by the engine thread only.

    Attributes:
        prompt: [P] token ids.
        seed: decides the answer's random numbers, together with each token's place.
        stop_ids: tokens that end the answer; also impossible before `min_new_tokens`.
        max_out: most tokens of the answer; the context's end is in it.
        logprob_start_len: first prompt position whose log-prob is wanted; -1 for none.
        stream: report progress after every token.
        output_ids, output_log_probs: the answer so far. While the request holds a slot the slot
            table has them, and they arrive here when it leaves.
        input_log_probs: of prompt tokens from `logprob_start_len` + 1 on, temperature 1.
        finish: `finish_reason` once ended.
        cached_tokens: prompt tokens whose KV came from a sibling.
        versions: (weight version, answer tokens written before it came), oldest first.
        slot: row in cache and slot table; -1 while waiting.
    """

    rid: str
    prompt: NDArray[np.int64]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    max_out: int
    return_logprob: bool = True
    logprob_start_len: int = -1
    stream: bool = False
    stop_strings: StopStrings | None = None
    output_ids: list[int] = field(default_factory=list[int])
    output_log_probs: list[float] = field(default_factory=list[float])
    input_log_probs: list[float] | None = None
    finish: Json | None = None
    cached_tokens: int = 0
    versions: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    slot: int = -1
    group: "RequestGroup | None" = None
    created_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    finished_at: float | None = None

    @property
    def tokens(self) -> NDArray[np.int64]:
        """[P + R] prompt and answer so far: what a prefill must read."""
        if not self.output_ids:
            return self.prompt
        return np.concatenate([self.prompt, np.array(self.output_ids, dtype=np.int64)])

    @property
    def weight_version(self) -> str:
        """Version of the weights that wrote the newest token."""
        return self.versions[-1][0] if self.versions else ""

    @property
    def needs_logit_edits(self) -> bool:
        """Whether its logits change before sampling."""
        return self.params.has_penalties or self.params.min_new_tokens > 0


@dataclass(slots=True, eq=False)
class RequestGroup:
    """Requests whose answers leave together; the engine thread counts them down."""

    requests: tuple[Request, ...]
    pending: int = 0

    def __post_init__(self) -> None:
        self.pending = len(self.requests)
        for request in self.requests:
            request.group = self
