"""One run folder as the data of its report."""

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slime.config.config import Config, slime_options, without_secrets
from slime.observability.report import curves
from slime.observability.report.files import (
    Notes,
    Row,
    as_list,
    as_number,
    plain_text,
    read_metric_rows,
    read_object,
)
from slime.observability.report.history import ledger_events, ledger_staleness, ledger_summary
from slime.observability.report.phases import phases
from slime.observability.report.samples import MAX_BYTES, shown_samples, staleness
from slime.observability.report.timeline import MAX_SPANS, timeline


def run_data(
    run: Path, *, name: str, rounds: tuple[int, int] | None = None, share: int = 1
) -> dict[str, Any]:
    """Everything the page shows of one run; gaps are told in `notes`, nothing is raised for them.

    Args:
        name: of the run on the page.
        rounds: first and last round whose samples and timeline are shown; None = all.
        share: number of runs on the page, which share its size.
    """
    notes = Notes()
    config = without_secrets(
        read_object(run / "config.json", notes, missing="its flags are unknown")
    )
    rows = read_metric_rows(run / "metrics.jsonl", notes)
    series = curves.series_of(rows)
    events = ledger_events(run / "ledger.jsonl", notes)
    series |= ledger_staleness(events) or staleness(run / "samples", notes)
    if groups := curves.constant_reward_groups(series):
        series["zero_std/groups"] = groups
    return {
        "name": name,
        "path": str(run),
        "model": _model(config),
        "flags": flags(config),
        "facts": _facts(config, rows, series),
        "series": curves.packed(series, rows),
        "charts": curves.charts(series),
        "phases": phases(series),
        "timeline": timeline(run, notes, rounds, MAX_SPANS // share),
        "samples": shown_samples(run / "samples", notes, rounds, MAX_BYTES // share),
        "ledger": ledger_summary(events),
        "notes": notes.lines,
    }


def flags(config: Mapping[str, Any]) -> list[Row]:
    """`{name, value, default, changed}` of every setting in config.json, as text."""
    defaults = json.loads(json.dumps(dataclasses.asdict(Config()), default=str))
    rows: list[Row] = []
    for name, value in sorted(config.items()):
        if name == "megatron_argv":
            rows.extend(_megatron_flags([str(word) for word in as_list(value)]))
            continue
        default = defaults.get(name)
        rows.append(
            {
                "name": _spelling(name),
                "value": plain_text(value),
                "default": plain_text(default),
                "changed": value != default,
            }
        )
    return sorted(rows, key=lambda row: row["name"])


def _facts(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, float]], series: Mapping[str, Any]
) -> Row:
    times = [number for row in rows if (number := row.get("time")) and number == number]
    rounds = {row["rollout/step"] for row in rows if "rollout/step" in row}
    return {
        "began": times[0] if times else None,
        "ended": times[-1] if times else None,
        "rounds": len(rounds),
        "planned": as_number(config.get("num_rollout")),
        "is_fresh": bool(times) and time.time() - times[-1] < 120,
        "evals": [name for name in sorted(series) if curves.is_eval_reward(name)],
    }


def _model(config: Mapping[str, Any]) -> str:
    path = config.get("hf_checkpoint")
    words = [str(word) for word in as_list(config.get("megatron_argv"))]
    sizes = dict(itertools.pairwise(words))
    parts = [f"{sizes[flag]} {unit}" for flag, unit in _SIZES if flag in sizes]
    name = "/".join(Path(str(path)).parts[-2:])  # a folder, or a name such as Qwen/Qwen3-4B
    return ", ".join([name, *parts] if path else parts)


_SIZES = (("--num-layers", "layers"), ("--hidden-size", "hidden"), ("--vocab-size", "words"))


def _megatron_flags(words: list[str]) -> list[Row]:
    """Words for Megatron's parser as rows, one per flag."""
    values: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word
            values[name] = []
        elif name:
            values[name].append(word)
    return [
        {"name": flag, "value": " ".join(given) or "on", "default": "Megatron's", "changed": True}
        for flag, given in values.items()
    ]


def _spelling(name: str) -> str:
    """The flag of a field; a derived field, which has none, by its own name."""
    known = {option.dest: option.name for option in slime_options()}
    return known.get(name, name)
