"""Metrics of a run as curves of the page: last value of a step wins, thinned, six digits."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slime.observability.metrics import find

Points = list[tuple[float, float]]  # (step, value), by step
Rows = Sequence[Mapping[str, float]]

AXES = ("rollout/step", "train/step", "eval/step")
_MAX_POINTS = 2000
_MAX_POINTS_OF_OTHERS = 300  # of what no chart shows: the table's small curves

# Every chart of the page: title, note, names of its curves; the first is drawn solid, the others
# dashed. A name may end in "*". Charts without data are left out.
CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Reward", "mean of a round, before normalisation", ("rollout/raw_reward",)),
    ("Response length", "mean, and dashed the longest", ("rollout/response_len/mean", "rollout/response_len/max")),
    ("Truncated", "share of samples cut by their limit", ("rollout/truncated_ratio",)),
    ("Loss", "per optimizer step", ("train/loss",)),
    ("Entropy", "of the policy, per token", ("train/entropy_loss",)),
    ("KL to the reference", "estimate, per token", ("train/kl_loss", "rollout/kl")),
    ("KL of the step", "old log-probs minus new ones", ("train/ppo_kl",)),
    ("Trainer against engine", "distance of log-probs per token: rounding, or something is broken",
     ("train/train_rollout_logprob_abs_diff",)),
    ("Clipped", "share of tokens whose ratio was clipped", ("train/pg_clipfrac",)),
    ("Gradient norm", "before clipping", ("train/grad_norm",)),
    ("Learning rate", "first parameter group", ("train/lr-pg_0",)),
    ("Staleness", "updates since the oldest weights in a sample: mean, and dashed the largest",
     ("staleness/mean", "staleness/max")),
    ("Speed", "response tokens per second and slot, dashed those that train",
     ("perf/tokens_per_gpu_per_sec", "perf/effective_tokens_per_gpu_per_sec")),
    ("Groups without signal", "groups in which all samples got the same reward", ("zero_std/groups",)),
)  # fmt: skip


def series_of(rows: Rows) -> dict[str, Points]:
    """The points of every metric; of a step that was logged again, after a resume, the last."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        axis = next((name for name in AXES if name in row), None)
        if axis is None or not math.isfinite(row[axis]):
            continue
        for name, value in row.items():
            if name not in AXES and name != "time":
                found.setdefault(name, {})[row[axis]] = value
    return {name: sorted(points.items()) for name, points in found.items()}


def constant_reward_groups(series: Mapping[str, Points]) -> Points:
    """Per round, the groups in which every sample got the same reward."""
    sums: dict[float, float] = {}
    for name, points in series.items():
        if name.startswith("rollout/zero_std/count_"):
            for step, value in points:
                sums[step] = sums.get(step, 0.0) + value
    return sorted(sums.items())


def thinned(points: Points, limit: int) -> Points:
    """At most `limit` points; of each stretch the lowest and the highest stay, so no spike is lost."""
    if len(points) <= limit:
        return points
    num_bins = max(1, limit // 2)
    kept: Points = []
    for i in range(num_bins):
        part = points[i * len(points) // num_bins : (i + 1) * len(points) // num_bins]
        finite = [point for point in part if math.isfinite(point[1])] or part
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return kept


def charts(series: Mapping[str, Points]) -> list[dict[str, Any]]:
    """The charts that have data, evaluations after the reward."""
    shown = [
        {"title": title, "note": note, "names": [name for name in names if series.get(name)]}
        for title, note, names in CHARTS
    ]
    evals = [
        {"title": f"Evaluation: {name[5:]}", "note": "mean reward", "names": [name]}
        for name in sorted(series)
        if is_eval_reward(name)
    ]
    return [chart for chart in [*shown[:1], *evals, *shown[1:]] if chart["names"]]


def is_eval_reward(name: str) -> bool:
    """Whether this is the reward of an evaluation: `eval/{dataset}` and nothing more."""
    metric = find(name)
    return metric is not None and metric.name == "eval/{dataset}"


def packed(series: Mapping[str, Points], rows: Rows) -> dict[str, dict[str, Any]]:
    """The curves as the page wants them: `{name: {axis, unit, meaning, x, y, last}}`."""
    drawn = {name for chart in charts(series) for name in chart["names"]}
    axes: dict[str, str] = {}
    for row in rows:
        axis = next((name for name in AXES if name in row), "rollout/step")
        for name in row:
            axes.setdefault(name, axis)
    packs: dict[str, dict[str, Any]] = {}
    for name, points in series.items():
        few = thinned(points, _MAX_POINTS if name in drawn else _MAX_POINTS_OF_OTHERS)
        metric = find(name)
        packs[name] = {
            "axis": axes.get(name, "rollout/step"),
            "unit": metric.unit if metric else "",
            "meaning": metric.meaning if metric else "",
            "x": [_step(step) for step, _ in few],
            "y": [short(value) for _, value in few],
            "last": short(points[-1][1]),
        }
    return packs


def short(value: float) -> float | str:
    """Six digits; what JSON lacks as text."""
    if math.isfinite(value):
        return float(f"{value:.6g}")
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _step(step: float) -> float:
    return int(step) if step == int(step) else step
