"""Usage: what one execution of a user's function asked of engines and tools, and how long it took."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, cast


@dataclass
class Usage:
    """Counts of one execution.

    Attributes:
        requests: answered by engines.
        tokens_in: prompt tokens of these requests; each turn counts the whole conversation so far.
        cached_tokens: those of `tokens_in` that engines had in their cache.
        tokens_out: written by engines.
        engine_time_s: seconds during which at least one request was under way.
        tool_calls: made through `slime.rollout.turns`.
        tool_errors: those that raised, or were late.
    """

    requests: int = 0
    tokens_in: int = 0
    cached_tokens: int = 0
    tokens_out: int = 0
    engine_time_s: float = 0.0
    tool_calls: int = 0
    tool_errors: int = 0
    _num_waiting: int = field(default=0, repr=False)
    _waiting_since: float = field(default=0.0, repr=False)

    @contextmanager
    def waiting(self) -> Generator[None]:
        """A request is under way; several at once count their time once."""
        if self._num_waiting == 0:
            self._waiting_since = monotonic()
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1
            if self._num_waiting == 0:
                self.engine_time_s += monotonic() - self._waiting_since

    def add_answer(self, answer: Any) -> None:
        """Count an engine's answer to /generate: one object, or a list of them."""
        parts = cast(list[Any], answer) if isinstance(answer, list) else [answer]
        self.requests += 1
        for part in parts:
            meta_info = _mapping(_mapping(part).get("meta_info"))
            self.tokens_in += _count(meta_info.get("prompt_tokens"))
            self.cached_tokens += _count(meta_info.get("cached_tokens"))
            self.tokens_out += _count(meta_info.get("completion_tokens"))

    def added_to(self, before: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
        """The counts for JSON, on top of those of an earlier part of the same sample.

        Args:
            before: what this method gave then, or nothing.
            seconds: the function ran. `other_time_s` is what of it no request was under way: tools,
                its own work, waiting for its turn on the event loop.
        """
        counts: dict[str, float] = {
            "requests": self.requests,
            "tokens_in": self.tokens_in,
            "cached_tokens": self.cached_tokens,
            "tokens_out": self.tokens_out,
            "engine_time_s": self.engine_time_s,
            "other_time_s": max(seconds - self.engine_time_s, 0.0),
            "tool_calls": self.tool_calls,
            "tool_errors": self.tool_errors,
        }
        return {name: value + before.get(name, 0) for name, value in counts.items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


def _count(value: Any) -> int:
    return value if type(value) is int else 0
