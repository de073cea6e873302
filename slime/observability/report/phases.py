"""Where the time of each round went, side by side: stacked bars, and the shares of the whole run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slime.observability.phases import Phase
from slime.observability.report.curves import Points

MAX_BARS = 400
SIDES = ("round", "trainer", "engines")

# A run from before the clocks of observability/phases.py: parts that its metrics tell of.
_OLDER = (
    ("rollout", "perf/rollout_time"),
    ("rollout_data", "perf/rollout_data_time"),
    ("log_probs", "perf/log_probs_time"),
    ("ref_log_probs", "perf/ref_log_probs_time"),
    ("actor_train", "perf/actor_train_time"),
    ("train: rest", None),
    ("update_weights", "perf/update_weights_time"),
    ("save", "perf/save_model_time"),
    ("other", None),
)
_INSIDE_TRAIN = ("perf/log_probs_time", "perf/ref_log_probs_time", "perf/actor_train_time")

Columns = dict[str, list[float]]


def phases(series: Mapping[str, Points]) -> list[dict[str, Any]]:
    """`{side, first, last, total, parts, shares}` of each side that the run has.

    `parts` are seconds per phase and bar; neighbouring rounds are averaged to at most 400 bars.
    `shares` are `{name, seconds, share}` over all rounds.
    """
    found = [_side(series, side) for side in SIDES if f"perf/{side}/idle_time" in series]
    return found or [_older(series)]


def _side(series: Mapping[str, Points], side: str) -> dict[str, Any]:
    tables = {name: dict(series.get(f"perf/{side}/{name}_time", ())) for name in Phase}
    rounds = sorted({step for table in tables.values() for step in table})
    columns: Columns = {
        str(name): [_finite(table.get(step, 0.0)) for step in rounds]
        for name, table in tables.items()
        if table
    }
    totals = [sum(column[i] for column in columns.values()) for i in range(len(rounds))]
    return _packed(side, rounds, totals, columns)


def _older(series: Mapping[str, Points]) -> dict[str, Any]:
    """What the driver's row of such a run told; what overlapped may add up to more than the round."""
    # By name: the time of an evaluation has the steps of another axis.
    wanted = {"perf/step_time", "perf/train_time", *(name for _, name in _OLDER if name)}
    tables = {name: dict(series[name]) for name in sorted(wanted & set(series))}
    total = tables.get("perf/step_time", {})
    rounds = sorted({step for table in tables.values() for step in table})
    columns: Columns = {label: [] for label, _ in _OLDER}
    for step in rounds:
        at = {name: table[step] for name, table in tables.items() if step in table}
        known = {label: at.get(name, 0.0) if name else 0.0 for label, name in _OLDER}
        train = at.get("perf/train_time", 0.0) - sum(at.get(name, 0.0) for name in _INSIDE_TRAIN)
        known["train: rest"] = max(0.0, train)
        known["other"] = max(0.0, at.get("perf/step_time", 0.0) - sum(known.values()))
        for label, value in known.items():
            columns[label].append(_finite(value))
    return _packed("round", rounds, [total.get(step, 0.0) for step in rounds], columns)


def _packed(
    side: str, rounds: Sequence[float], totals: Sequence[float], columns: Columns
) -> dict[str, Any]:
    bins = _bins(len(rounds))
    sums = {name: sum(values) for name, values in columns.items() if any(values)}
    whole = sum(sums.values())
    return {
        "side": side,
        "first": [_number(rounds[a]) for a, _ in bins],
        "last": [_number(rounds[b - 1]) for _, b in bins],
        "total": [_mean(totals[a:b]) for a, b in bins],
        "parts": [
            {"name": name, "seconds": [_mean(columns[name][a:b]) for a, b in bins]} for name in sums
        ],
        "shares": [
            {"name": name, "seconds": _short(seconds), "share": _short(seconds / whole)}
            for name, seconds in sums.items()
            if whole > 0
        ],
    }


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _number(step: float) -> float:
    return int(step) if step == int(step) else step


def _bins(count: int) -> list[tuple[int, int]]:
    num_bins = min(count, MAX_BARS)
    return [(i * count // num_bins, (i + 1) * count // num_bins) for i in range(num_bins)]


def _mean(values: Sequence[float]) -> float:
    return _short(sum(values) / len(values))


def _short(value: float) -> float:
    return float(f"{value:.4g}")
