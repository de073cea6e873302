"""The ledger of a run, summed up: attempts, rounds made again, how old the weights were."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from slime.observability.report.curves import Points
from slime.observability.report.files import (
    Notes,
    Row,
    as_list,
    as_number,
    as_round,
    plain_text,
    read_rows,
)
from slime.observability.report.samples import staleness_curves

_MAX_ATTEMPTS = 50


def ledger_events(path: Path, notes: Notes) -> list[Row]:
    """The events as they stand in the file; none for a run without a ledger, which is no gap."""
    return read_rows(path, notes, missing="its history is unknown") if path.is_file() else []


def ledger_summary(events: Sequence[Row]) -> Row | None:
    """Attempts, counts of events and rounds made again; None without events.

    An attempt that begins at round r makes again what earlier attempts did from r on.
    """
    if not events:
        return None
    counts: dict[str, int] = {}
    attempts: list[Row] = []
    done: set[int] = set()
    redone = 0
    for event in events:
        kind, number = str(event.get("event", "?")), as_round(event.get("rollout_id"))
        counts[kind] = counts.get(kind, 0) + 1
        if kind == "attempt":
            attempts.append(
                {key: plain_text(value) for key, value in event.items() if key != "event"}
            )
            first = as_round(event.get("first_rollout")) or 0
            redone += sum(number >= first for number in done)
            done = {number for number in done if number < first}
        elif kind == "rollout" and number is not None:
            done.add(number)
    return {
        "counts": counts,
        "attempts": attempts[-_MAX_ATTEMPTS:],
        "num_attempts": len(attempts),
        "rounds": len(done),
        "redone": redone,
        "ended": events[-1].get("event") == "end",
    }


def ledger_staleness(events: Sequence[Row]) -> dict[str, Points]:
    """How old the weights of every sample were, round by round; empty where no event tells."""
    oldest: dict[int, list[float]] = {}
    for event in events:
        number, samples = as_round(event.get("rollout_id")), event.get("samples")
        if event.get("event") == "rollout" and number is not None and isinstance(samples, dict):
            versions = map(as_number, as_list(cast(dict[str, Any], samples).get("version")))
            oldest[number] = [version for version in versions if version is not None]
    return staleness_curves(oldest)
