"""Start-up self-check: the engine's log-probs against the model's own code, and its bits against
themselves in other batch shapes."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slime.engines.embedded.model import ATTENTION_CHOICES, ModelRunner
from slime.engines.embedded.requests import Request
from slime.engines.embedded.scheduler import Scheduler, SchedulerLimits
from slime.engines.embedded.shapes import LENGTH_STEP, BatchShapes
from slime.engines.protocol import SamplingParams
from slime.errors import EngineError

logger = logging.getLogger(__name__)

# fp32 differs by 1e-5 at most on every architecture tried; a wrong mask or cache by more than 1.
MAX_DIFFERENCE = 1e-3
# bf16 itself moves log-probs by 0.13 (mean 0.02): only gross faults can be told apart.
MAX_DIFFERENCE_HALF = 0.5
_PROMPT_LENGTHS = (3, 17, 40)
_NEW_TOKENS = 6
_PROBE_ROWS = 8
_PROBE_TOKENS = 12
_PROBE_BUDGET_S = 2.0


@dataclass(frozen=True, kw_only=True)
class CheckedRunner:
    """A runner that passed.

    Attributes:
        difference: largest |log-prob by the engine - log-prob by one teacher-forced pass|.
        is_invariant: whether a row's bits were the same in every batch shape tried; None when
            not all shapes could be tried in time.
    """

    runner: ModelRunner
    shapes: BatchShapes
    difference: float
    is_invariant: bool | None


def check_model(
    model: Any,
    *,
    max_running: int,
    attention: str = "auto",
    context_length: int | None = None,
    deterministic: bool = False,
) -> CheckedRunner:
    """A runner whose log-probs agree with the model's own, with the fastest attention that does.

    Args:
        attention: `auto` or one of `ATTENTION_CHOICES`.
        deterministic: allow only batch shapes that give every row the same bits.

    Raises:
        EngineError: no attention computes the model's log-probs; or `deterministic` and the bits
            depend on the batch even at one fixed number of rows.
    """
    runner, difference = _choose_attention(model, attention, context_length)
    shapes = BatchShapes.up_to(max_running)
    budget_s = None if deterministic else _PROBE_BUDGET_S
    shapes_that_agree, is_invariant = probe_invariance(runner, shapes, budget_s)
    if deterministic:
        if is_invariant is False and not _is_invariant_at(runner, shapes.largest):
            raise EngineError(
                "--enable-deterministic-inference: on this machine a request's log-probs depend on "
                "what else runs, even with a fixed number of rows; run without the flag"
            )
        shapes, is_invariant = shapes.only(shapes_that_agree), True
    logger.info(
        "self-check: attention %s, |log-probs - teacher-forced| <= %.1e, batch-invariant: %s",
        runner.attention, difference, {True: "yes", False: "no", None: "not tested"}[is_invariant],
    )  # fmt: skip
    return CheckedRunner(
        runner=runner, shapes=shapes, difference=difference, is_invariant=is_invariant
    )


def _choose_attention(
    model: Any, attention: str, context_length: int | None
) -> tuple[ModelRunner, float]:
    choices = ATTENTION_CHOICES if attention == "auto" else (attention,)
    runner = ModelRunner(model, attention="eager", context_length=context_length)
    limit = MAX_DIFFERENCE if model.dtype == torch.float32 else MAX_DIFFERENCE_HALF
    failures: list[str] = []
    for choice in choices:
        try:
            runner.set_attention(choice)
            difference = log_prob_difference(runner)
        except (NotImplementedError, ValueError, AttributeError, TypeError) as error:
            failures.append(f"{choice}: {error}")
            continue
        if difference <= limit:
            return runner, difference
        failures.append(f"{choice}: log-probs differ by {difference:.3g}, allowed {limit:g}")
    raise EngineError(
        f"self-check failed: the embedded engine does not compute {type(model).__name__} as "
        f"transformers does ({'; '.join(failures)}); use SGLang for this model"
    )


def log_prob_difference(runner: ModelRunner) -> float:
    """Largest difference between the engine's log-probs of a few sampled answers and those of one
    teacher-forced pass; infinite when either is not finite."""
    scheduler = Scheduler(runner, SchedulerLimits(max_running=_PROBE_ROWS))
    requests = _sample_requests(runner)
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        scheduler.step()
    worst = 0.0
    for request in requests:
        logits = runner.teacher_forced(request.tokens)[len(request.prompt) - 1 : -1]
        chosen = torch.tensor(request.output_ids)[:, None]
        expected = torch.log_softmax(logits, -1).gather(1, chosen)[:, 0]
        difference = (expected - torch.tensor(request.output_log_probs)).abs().max()
        worst = max(worst, float(torch.nan_to_num(difference, nan=torch.inf)))
    return worst


def _sample_requests(runner: ModelRunner) -> list[Request]:
    """Random prompts of several lengths; one crosses the sliding window if that is short enough."""
    rng = np.random.default_rng(0)
    window = runner.masks.window
    lengths = [*_PROMPT_LENGTHS, *([window + 3] if window is not None and window < 512 else [])]
    room = runner.context_length - _NEW_TOKENS
    return [
        Request(
            rid=f"self-check-{i}",
            prompt=rng.integers(0, runner.vocab_size, min(length, room)),
            params=SamplingParams(),
            seed=i,
            stop_ids=(),
            max_out=_NEW_TOKENS,
        )
        for i, length in enumerate(lengths)
    ]


def probe_invariance(
    runner: ModelRunner, shapes: BatchShapes, budget_s: float | None
) -> tuple[set[int], bool | None]:
    """Row counts that give the same bits as the largest, and whether all shapes tried agree.

    Args:
        budget_s: stop after about so many seconds; the answer is then None unless it is no.
    """
    probe = _Probe(runner, shapes.largest)
    deadline = None if budget_s is None else time.monotonic() + budget_s
    # Ascending, so that a short budget is spent on the cheap ones.
    results: dict[int, NDArray[np.float32]] = {}
    for count in shapes.counts:
        if results and deadline is not None and time.monotonic() > deadline:
            break
        results[count] = probe.decode(count, LENGTH_STEP)
    largest = max(results)
    agreeing = {n for n, bits in results.items() if np.array_equal(bits, results[largest])}
    if len(agreeing) < len(results) or not probe.lengths_agree():
        return agreeing, False
    return agreeing, True if len(results) == len(shapes.counts) else None


def _is_invariant_at(runner: ModelRunner, num_rows: int) -> bool:
    """Whether lengths do not matter, and rows neither at a fixed number of them."""
    return _Probe(runner, num_rows).lengths_agree()


class _Probe:
    """The same eight prompts, run in different shapes."""

    def __init__(self, runner: ModelRunner, max_rows: int) -> None:
        rng = np.random.default_rng(1)
        self._runner = runner
        self._max_rows = max_rows
        self._prompts = rng.integers(0, runner.vocab_size, (_PROBE_ROWS, _PROBE_TOKENS))
        self._next = rng.integers(0, runner.vocab_size, _PROBE_ROWS)
        self._cache = runner.new_cache(max_rows)
        self._cache.reserve(max_rows, 2 * LENGTH_STEP)
        self.prefill(_PROBE_ROWS, LENGTH_STEP)

    def prefill(self, num_rows: int, width: int) -> NDArray[np.float32]:
        """Hidden states of the first prompt, read with others beside it."""
        ids = np.zeros((num_rows, width), np.int64)
        ids[:, :_PROBE_TOKENS] = self._prompts[:num_rows]
        hidden = self._runner.prefill(self._cache, 0, ids)
        return hidden[0, :_PROBE_TOKENS].float().numpy()

    def decode(self, num_rows: int, kv_length: int) -> NDArray[np.float32]:
        """Logits of the next token of each prompt, in a pass of `num_rows` rows."""
        ids, lengths = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
        ids[:_PROBE_ROWS], lengths[:_PROBE_ROWS] = self._next, _PROBE_TOKENS
        return self._runner.decode(self._cache, ids, lengths, kv_length)[:_PROBE_ROWS].numpy()

    def lengths_agree(self) -> bool:
        """Whether more cached tokens, wider prefills and other prefill rows leave the bits
        alone."""
        if self._cache.length < 2 * LENGTH_STEP:
            return True
        short, long = (self.decode(self._max_rows, n * LENGTH_STEP) for n in (1, 2))
        reads = [self.prefill(rows, n * LENGTH_STEP) for rows, n in ((8, 1), (1, 1), (8, 2))]
        same_reads = all(np.array_equal(read, reads[0]) for read in reads[1:])
        return np.array_equal(short, long) and same_reads
