"""EngineStats: counters of the engine thread, and their Prometheus text."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from slime.engines.embedded.requests import Request
from slime.engines.protocol import FinishType

_WINDOW_S = 1.0
_STALE_S = 5.0


@dataclass(slots=True)
class EngineStats:
    """What happened since the start; written by the engine thread, read by any other."""

    num_requests: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_retracted: int = 0
    num_steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    weight_updates: int = 0
    latency_sum_s: float = 0.0
    _tokens_at_mark: int = 0
    _mark_s: float = field(default_factory=time.monotonic)
    _rate: float = 0.0

    def count_finished(self, request: Request) -> None:
        """Add an ended request."""
        self.num_finished += 1
        self.latency_sum_s += (request.finished_at or 0.0) - request.created_at
        if request.finish is not None and request.finish["type"] == FinishType.ABORT.value:
            self.num_aborted += 1

    def count_step(self, num_tokens: int) -> None:
        """Add one pass that wrote so many tokens."""
        self.num_steps += 1
        self.generation_tokens += num_tokens
        now = time.monotonic()
        if now - self._mark_s >= _WINDOW_S:
            self._rate = (self.generation_tokens - self._tokens_at_mark) / (now - self._mark_s)
            self._mark_s, self._tokens_at_mark = now, self.generation_tokens

    @property
    def throughput(self) -> float:
        """Tokens per second written lately; 0 once nothing was written for some seconds."""
        return self._rate if time.monotonic() - self._mark_s < _STALE_S else 0.0


def prometheus_text(gauges: Mapping[str, float], stats: EngineStats, model_name: str) -> str:
    """Metrics in Prometheus' text format, under the names SGLang uses where it has one.

    Args:
        gauges: name without prefix -> present value.
    """
    counters = {
        "num_requests_total": stats.num_requests,
        "num_aborted_requests_total": stats.num_aborted,
        "num_retracted_requests_total": stats.num_retracted,
        "prompt_tokens_total": stats.prompt_tokens,
        "cached_tokens_total": stats.cached_tokens,
        "generation_tokens_total": stats.generation_tokens,
        "decode_steps_total": stats.num_steps,
        "weight_updates_total": stats.weight_updates,
    }
    name = model_name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    label = f'{{model_name="{name}"}}'
    lines = [
        *_lines("gauge", gauges.items(), label),
        *_lines("counter", counters.items(), label),
        "# TYPE sglang:e2e_request_latency_seconds summary",
        f"sglang:e2e_request_latency_seconds_sum{label} {stats.latency_sum_s}",
        f"sglang:e2e_request_latency_seconds_count{label} {stats.num_finished}",
    ]
    return "\n".join(lines) + "\n"


def _lines(kind: str, metrics: Iterable[tuple[str, float]], label: str) -> Iterable[str]:
    for name, value in metrics:
        yield f"# TYPE sglang:{name} {kind}"
        yield f"sglang:{name}{label} {value}"
