"""Spans of all roles of a run, for the page's chart: newest rounds first, where all are too many."""

from pathlib import Path
from typing import Any

from slime.observability.report.files import Notes, Row, as_number, as_round, read_rows
from slime.observability.timeline import FOLDER

RoundRange = tuple[int, int]  # first and last round, both included

# Twenty-odd spans make a round of one rank; a page keeps its size by showing so many.
MAX_SPANS = 20_000


def timeline(run: Path, notes: Notes, rounds: RoundRange | None, limit: int) -> dict[str, Any]:
    """`{start, roles, names, rounds, spans}`; a span is [role, name, start, length, round or null].

    Times in seconds, those of spans since `start`, which is in unix seconds. `rounds` are
    [round, start, end], what the page's choice of rounds goes by.

    Args:
        rounds: only what happened during these rounds; None = all.
        limit: spans; of more the newest are kept.
    """
    files = sorted((run / FOLDER).glob("*.jsonl"), key=_role_order)
    if not files:
        notes.add("There is no timeline: the run was made by an older slime, or has not begun.")
    spans = [span for file in files for span in _spans(file, notes)]
    bounds = _bounds(spans)
    if rounds is not None:
        inside = [bounds[number] for number in bounds if rounds[0] <= number <= rounds[1]]
        begin = min((start for start, _ in inside), default=0.0)
        end = max((end for _, end in inside), default=0.0)
        spans = [span for span in spans if span["end"] > begin and span["start"] < end]
    if len(spans) > limit:
        total = len(spans)
        spans = sorted(spans, key=lambda span: span["end"])[-limit:]
        notes.add(
            f"The timeline shows the last {limit} of {total} spans; "
            "--rounds FIRST:LAST shows others."
        )
    return _packed(spans, [file.stem for file in files])


def _spans(file: Path, notes: Notes) -> list[Row]:
    rows = read_rows(file, notes, missing="this role has no lane")
    spans: list[Row] = []
    for row in rows:
        start, end = as_number(row.get("start")), as_number(row.get("end"))
        if start is None or end is None or not end >= start:  # a NaN is no time either
            continue
        span = {"role": str(row.get("role", file.stem)), "name": str(row.get("name", "?"))}
        spans.append(
            span | {"start": start, "end": end, "rollout_id": as_round(row.get("rollout_id"))}
        )
    return spans


def _bounds(spans: list[Row]) -> dict[int, tuple[float, float]]:
    """When each round began and ended; of a round that was done again, both times together."""
    bounds: dict[int, tuple[float, float]] = {}
    for span in spans:
        number = span["rollout_id"]
        if number is not None:
            start, end = bounds.get(number, (span["start"], span["end"]))
            bounds[number] = min(start, span["start"]), max(end, span["end"])
    return bounds


def _packed(spans: list[Row], file_names: list[str]) -> dict[str, Any]:
    order = {name: place for place, name in enumerate(file_names)}
    places = len(file_names)
    roles = sorted(
        {span["role"] for span in spans},
        key=lambda role: (order.get(role.replace(" ", "-"), places), role),
    )
    names = sorted({span["name"] for span in spans})
    role_index = {role: i for i, role in enumerate(roles)}
    name_index = {name: i for i, name in enumerate(names)}
    start = min((span["start"] for span in spans), default=0.0)
    return {
        "start": start,
        "roles": roles,
        "names": names,
        "rounds": [
            [number, round(a - start, 4), round(b - start, 4)]
            for number, (a, b) in sorted(_bounds(spans).items())
        ],
        "spans": [
            [
                role_index[span["role"]],
                name_index[span["name"]],
                round(span["start"] - start, 4),
                round(span["end"] - span["start"], 4),
                span["rollout_id"],
            ]
            for span in sorted(spans, key=lambda span: (span["start"], -span["end"]))
        ],
    }


def _role_order(file: Path) -> tuple[int, int, str]:
    """Driver, rollout manager, engines, then the training ranks by number."""
    stem = file.stem
    kinds = ("driver", "rollout-manager", "engine", "train-rank")
    kind = next((i for i, name in enumerate(kinds) if stem.startswith(name)), len(kinds))
    number = stem.rpartition("-")[2]
    return kind, int(number) if number.isdecimal() else 0, stem
