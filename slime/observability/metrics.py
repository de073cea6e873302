"""Every metric slime logs, by name: unit, reduction, meaning; and one line of them for people.

In a name, `{braces}` stand for one varying part, and `/*` for `/mean /median /max /min` of a list.
Plugins may log other names: those are kept as they come.
"""

import functools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from slime.observability.phases import PHASES_MARKDOWN

Reduction = Literal["mean", "sum", "max", "one"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as logged, or a pattern (see the module).
        unit: "s", "tokens", "nats", "fraction", ...; "1" for a pure number.
        reduction: how samples, micro-batches or ranks become one value; "one": it has one source.
        meaning: what it tells.
    """

    name: str
    unit: str
    reduction: Reduction
    meaning: str

    def matches(self, name: str) -> bool:
        """Whether `name`, as logged, is this metric."""
        return re.fullmatch(_as_regex(self.name), name) is not None


_MARKDOWN_HEAD = """\
# Metrics

Written by `make docs`; a test holds it current. They go to `metrics.jsonl` in the run's folder, one
line per call, and with `--use-tensorboard` to TensorBoard. The step of a line is `rollout/step`
(the round), `train/step` (the optimizer step, counted through) or `eval/step`.

In a name, `{braces}` stand for one varying part, `/*` for `/mean`, `/median`, `/max` and `/min`.
Reduction tells how samples, micro-batches or ranks become one value; "sum" over what already has
been divided by the whole step's denominator is a mean over the step; "one" has a single source.

| name | unit | reduction | meaning |
|---|---|---|---|
"""

_SPREAD = ("mean", "median", "max", "min")

# What a list of samples is summed up to: under rollout/ and under eval/{dataset}/.
_SAMPLE_METRICS = [
    Metric("response_len/*", "tokens", "one", "length of the responses, tool outputs included"),
    Metric("truncated_ratio", "fraction", "mean", "samples cut by their length limit"),
    Metric("repetition_frac", "fraction", "mean", "samples that repeat themselves"),
    Metric("zero_std/count_{reward}", "groups", "sum", "groups that got this reward throughout"),
    Metric("spec_accept_rate", "fraction", "one", "drafted tokens that were accepted"),
    Metric("spec_accept_length", "tokens", "one", "tokens written per verification"),
    Metric("prefix_cache_hit_rate", "fraction", "one", "prompt tokens found in the engines' cache"),
    Metric("avg_cached_tokens_per_sample", "tokens", "mean", "prompt tokens found in the cache"),
    Metric(
        "mixed_versions_ratio", "fraction", "mean", "samples written by several weight versions"
    ),
    Metric("unknown_split_ratio", "fraction", "mean", "of these, nobody knows which wrote what"),
    Metric("error_cat/{category}", "fraction", "mean", "samples in this category of the reward"),
    # Of custom generate functions, per execution:
    Metric("usage/requests/*", "1", "one", "requests to engines: turns, of all agents together"),
    Metric("usage/tokens_in/*", "tokens", "one", "prompt tokens of all its requests"),
    Metric("usage/tokens_out/*", "tokens", "one", "tokens engines wrote for it"),
    Metric("usage/engine_time/*", "s", "one", "while a request of it was under way"),
    Metric("usage/other_time/*", "s", "one", "the rest of its time: tools, waiting for its turn"),
    Metric("usage/tool_calls/*", "1", "one", "made through slime.rollout.turns"),
    Metric("usage/tool_error_ratio", "fraction", "one", "of these, raised or late"),
    # With --environment-path:
    Metric("environment/steps/*", "1", "one", "turns of an episode that its environment answered"),
    Metric("environment/terminated_ratio", "fraction", "mean", "episodes that came to their end"),
    Metric("environment/invalid_action_ratio", "fraction", "one", "turns that were no action"),
    Metric("environment/restarts", "1", "sum", "begun anew, as they could not be repeated"),
]

_ROLLOUT = [
    Metric("rollout/dynamic_filter/drop_{reason}", "groups", "sum", "groups the filter dropped"),
    Metric("rollout/aborted_groups", "groups", "sum", "unfinished when the round was full"),
    Metric("rollout/continued_answers", "1", "sum", "cut short by a weight sync, and gone on with"),
    Metric("rollout/staleness/*", "rounds", "one", "trained since a sample's oldest weights"),
    Metric("rollout/staleness/{n}", "fraction", "mean", "samples that are so many rounds old"),
    Metric("rollout/in_flight_groups", "groups", "one", "on their way when the round was there"),
    Metric("rollout/whole_groups", "groups", "one", "whole then, and left to a later round"),
    Metric("rollout/renewed_groups", "groups", "sum", "too old to be trained, begun anew"),
    Metric("rollout/correct_samples/response_len/*", "tokens", "one", "length of solved samples"),
    Metric("rollout/raw_reward", "1", "mean", "reward before normalisation"),
    Metric("rollout/rewards", "1", "mean", "reward after normalisation"),
    Metric("rollout/response_lengths", "tokens", "mean", "length of the responses trained on"),
    Metric("rollout/total_lengths", "tokens", "mean", "prompt and response"),
    Metric("rollout/truncated", "fraction", "mean", "samples cut by their length limit"),
    Metric("rollout/log_probs", "nats", "mean", "by the trainer before the update, per token"),
    Metric("rollout/ref_log_probs", "nats", "mean", "by the frozen reference, per token"),
    Metric("rollout/rollout_log_probs", "nats", "mean", "by the engine, per token"),
    Metric("rollout/teacher_log_probs", "nats", "mean", "by the teacher, per token"),
    Metric("rollout/advantages", "1", "mean", "per token"),
    Metric("rollout/returns", "1", "mean", "per token"),
    Metric("rollout/kl", "nats", "mean", "estimate of KL(policy, reference), per token"),
    Metric("rollout/dropped_samples", "samples", "sum", "left over after the last full step"),
    Metric("rollout/dropped_executions", "rollouts", "sum", "left over after the last full step"),
    Metric("rollout/filler_samples", "samples", "sum", "masked rows that even the ranks out"),
    Metric("rollout/num_micro_batches", "1", "one", "per rank, over all steps of the round"),
    Metric("rollout/rank_tokens_max_over_mean", "1", "one", "1 = all ranks got equally much"),
    Metric("rollout/engine_restarts", "1", "sum", "engines started again; absent when none was"),
    Metric("rollout/router_restarts", "1", "sum", "the same for the router"),
    Metric("rollout/round_number", "1", "mean", "turns of a sample, where its metadata has them"),
    Metric("passrate/pass@{k}", "fraction", "mean", "prompts solved by one of k tries, estimated"),
    Metric("multi_turn/{length}/response_length_{part}", "tokens", "one", "per sample"),
    Metric("multi_turn/multi_turn_metric/round_number_{part}", "1", "one", "turns of a sample"),
]

_EVAL = [
    Metric("eval/{dataset}-truncated_ratio", "fraction", "mean", "samples cut by their limit"),
    Metric("eval/{dataset}-pass@{k}", "fraction", "mean", "solved by one of k tries, estimated"),
    Metric("eval/{dataset}", "1", "mean", "reward"),  # last: its pattern covers the two above
]

_TRAIN = [
    Metric("train/loss", "1", "sum", "what the optimizer step minimised"),
    Metric("train/pg_loss", "1", "sum", "policy-gradient part of the loss"),
    Metric("train/entropy_loss", "nats", "sum", "entropy of the policy"),
    Metric("train/step_skipped", "0/1", "one", "1 when the gradient was not finite, nothing done"),
    Metric("train/pg_clipfrac", "fraction", "sum", "tokens whose ratio was clipped"),
    Metric("train/ppo_kl", "nats", "sum", "old_log_probs - log_probs: how far the step has gone"),
    Metric("train/kl_loss", "nats", "sum", "KL to the reference, before its coefficient"),
    Metric(
        "train/train_rollout_logprob_abs_diff",
        "nats",
        "sum",
        "distance of log_probs and rollout_log_probs per token: trainer against engine",
    ),
    Metric("train/ois", "1", "sum", "ratio of the policy to the one that generated"),
    Metric("train/tis", "1", "sum", "truncated importance weight"),
    Metric("train/tis_clipfrac", "fraction", "sum", "tokens whose importance weight was cut"),
    Metric("train/tis_abs", "1", "sum", "distance of the importance weight from 1"),
    Metric("train/opsm_clipfrac", "fraction", "sum", "tokens masked as too far off policy"),
    Metric("train/grad_norm", "1", "one", "before clipping"),
    Metric("train/lr-pg_{group}", "1", "one", "learning rate of a parameter group"),
    Metric("train/global_batch_size", "rollouts", "one", "executions in the optimizer step"),
]

_PERF = [
    Metric("perf/recovery_time", "s", "max", "from an engine found dead until it serves again"),
    Metric("perf/round_time", "s", "one", "from the row before to this one: all of the time"),
    Metric("perf/step_time", "s", "one", "the same without the evaluation in it"),
    Metric("perf/{part}_time", "s", "max", "seconds one part of the round took"),
    Metric("perf/round/{phase}_time", "s", "one", "the driver's time; together perf/round_time"),
    Metric("perf/trainer/{phase}_time", "s", "mean", "a training rank's time"),
    Metric("perf/engines/{phase}_time", "s", "one", "the engines' time, all of them together"),
    Metric("perf/{side}/idle_ratio", "fraction", "mean", "idle_time of the side's whole time"),
    Metric(
        "perf/engines/samples_in_flight",
        "samples",
        "mean",
        "at the engines at once, over generate_time and eval_time",
    ),
    Metric("perf/tokens_per_gpu_per_sec", "tokens/s", "one", "response tokens per second and slot"),
    Metric("perf/effective_tokens_per_gpu_per_sec", "tokens/s", "one", "the same, trained ones"),
    Metric("perf/longest_sample_tokens_per_sec", "tokens/s", "one", "speed of the longest sample"),
    Metric("perf/longest_effective_sample_tokens_per_sec", "tokens/s", "one", "trained tokens"),
    Metric(
        "perf/{sample}_tokens_per_sec_without_non_generation",
        "tokens/s",
        "one",
        "the same, without the time spent on tools",
    ),
    Metric(
        "perf/non_generation_time/*",
        "s",
        "one",
        "time of a sample without a request to an engine: tools",
    ),
    Metric("perf/request/e2e_latency/*", "s", "one", "of one request to an engine"),
    Metric("perf/request/queue_time/*", "s", "one", "of one request in an engine's queue"),
    Metric("perf/update_weights_wire_bytes", "bytes", "sum", "sent to the engines in one sync"),
    Metric(
        "perf/update_weights_hold_time",
        "s",
        "one",
        "of perf/update_weights_time: until running answers that had to end for new weights did",
    ),
    Metric("perf/update_weights_density", "fraction", "mean", "bytes that changed, in delta mode"),
]


def _under(prefix: str, metrics: Iterable[Metric]) -> list[Metric]:
    return [Metric(prefix + m.name, m.unit, m.reduction, m.meaning) for m in metrics]


METRICS: tuple[Metric, ...] = (
    *_under("rollout/", _SAMPLE_METRICS),
    *_ROLLOUT,
    *_under("eval/{dataset}/", _SAMPLE_METRICS),
    *_EVAL,
    *_TRAIN,
    *_PERF,
)


@functools.lru_cache(maxsize=4096)  # a pattern per metric: half a millisecond a name
def find(name: str) -> Metric | None:
    """The metric that is logged as `name`; None for one slime does not know."""
    return next((metric for metric in METRICS if metric.matches(name)), None)


def unknown_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that are not registered: a plugin's, or a slip of the pen."""
    return [name for name in names if find(name) is None]


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """`{name}/mean`, `/median`, `/max` and `/min` of `values`; nothing for none."""
    if not values:
        return {}
    numbers = (statistics.fmean(values), statistics.median(values), max(values), min(values))
    return {f"{name}/{part}": float(n) for part, n in zip(_SPREAD, numbers, strict=True)}


def metrics_markdown() -> str:
    """docs/metrics.md."""
    rows = [f"| `{m.name}` | {m.unit} | {m.reduction} | {m.meaning} |" for m in METRICS]
    return _MARKDOWN_HEAD + "\n".join(rows) + "\n" + PHASES_MARKDOWN


def summary_line(metrics: Mapping[str, float], names: Iterable[str] | None = None) -> str:
    """One line for people: `raw_reward 0.43  grad_norm 1.2e-05  rollout_time 3.1 s`.

    Args:
        metrics: as logged.
        names: which of them, in this order; absent ones are left out. By default all.
    """
    chosen = metrics if names is None else [name for name in names if name in metrics]
    return "  ".join(_for_people(name, metrics[name]) for name in chosen)


def _for_people(name: str, value: float) -> str:
    area, _, short = name.partition("/")
    label = short if area in ("rollout", "train", "perf") else name
    known = find(name)
    unit = f" {known.unit}" if known is not None and known.unit in ("s", "tokens/s") else ""
    return f"{label} {format_number(value)}{unit}"


def format_number(value: float) -> str:
    """Two to four digits, without an exponent where that stays short: `0.4312`, `3e-05`."""
    if math.isfinite(value) and value == round(value) and abs(value) < 1e15:
        return str(int(value))
    size = abs(value)
    if 0.001 <= size < 1000:
        return f"{value:.4g}"
    return f"{value:.0f}" if 1000 <= size < 1e9 else f"{value:.2g}"


def _as_regex(pattern: str) -> str:
    parts = re.split(r"(\{[^}]*\}|/\*)", pattern)
    return "".join(
        f"/(?:{'|'.join(_SPREAD)})"
        if part == "/*"
        else "[^/]+"
        if part[:1] == "{"
        else re.escape(part)
        for part in parts
    )
