"""Helpers that run the embedded scheduler on tiny models without a server."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from slime.engines.embedded.model import ModelRunner
from slime.engines.embedded.requests import Request
from slime.engines.embedded.scheduler import Scheduler, SchedulerLimits
from slime.engines.protocol import SamplingParams


def make_request(prompt: Iterable[int], rid: str = "r", *, seed: int = 0, **values: Any) -> Request:
    """A request; keyword arguments are sampling parameters, or fields of Request."""
    fields = {"stop_ids", "stream", "stop_strings", "logprob_start_len", "return_logprob"}
    own = {name: values.pop(name) for name in fields & set(values)}
    params = SamplingParams.from_json(values)
    return Request(
        rid=rid,
        prompt=np.array(list(prompt), dtype=np.int64),
        params=params,
        seed=seed,
        max_out=params.max_new_tokens or 0,
        **{"stop_ids": (), **own},
    )


def random_prompts(
    count: int, *, low: int = 3, high: int = 20, vocab: int = 64, seed: int = 0
) -> list[list[int]]:
    """Prompts of several lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, rng.integers(low, high)).tolist() for _ in range(count)]


def make_scheduler(runner: ModelRunner, **limits: Any) -> Scheduler:
    """A scheduler of eight slots unless said otherwise."""
    return Scheduler(runner, SchedulerLimits(**{"max_running": 8, **limits}))


def run_all(scheduler: Scheduler, requests: Iterable[Request]) -> list[Request]:
    """The requests, all ended."""
    listed = list(requests)
    for request in listed:
        scheduler.add(request)
    while scheduler.has_work:
        scheduler.step()
    return listed


def teacher_log_probs(runner: ModelRunner, request: Request) -> list[float]:
    """Log-probs of a request's answer by one pass of the model's own code, same temperature."""
    logits = runner.teacher_forced(request.tokens)[len(request.prompt) - 1 : -1]
    scaled = torch.log_softmax(logits / request.params.temperature, -1)
    return scaled.gather(1, torch.tensor(request.output_ids)[:, None])[:, 0].tolist()


def largest_difference(runner: ModelRunner, requests: Iterable[Request]) -> float:
    """Largest |log-prob by the engine - by the teacher| over all answers."""
    return max(
        float(np.abs(np.subtract(teacher_log_probs(runner, r), r.output_log_probs)).max())
        for r in requests
    )
