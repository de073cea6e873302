"""A few samples of a few rounds, with their tokens, as the page's browser shows them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from slime.observability.report.curves import Points, short
from slime.observability.report.files import (
    Notes,
    Row,
    as_list,
    as_number,
    as_round,
    read_rows,
)

MAX_BYTES = 2_500_000  # of all samples of the page, as JSON
_MAX_ROUNDS = 100
_MAX_PER_ROUND = 8
_MAX_TOKENS = 1024
_MAX_CHARS = 8000
_STALENESS_ROUNDS = 150  # files that are read for the curve, spread over the run


def sample_files(folder: Path) -> dict[tuple[int, bool], Path]:
    """The file of each round, by (round, is an evaluation)."""
    files: dict[tuple[int, bool], Path] = {}
    for path in folder.glob("*.jsonl"):
        number = path.stem.removeprefix("eval_")
        if number.isdecimal():
            files[int(number), path.stem.startswith("eval_")] = path
    return dict(sorted(files.items()))


def shown_samples(
    folder: Path, notes: Notes, rounds: tuple[int, int] | None, max_bytes: int
) -> list[Row]:
    """`{rollout_id, evaluation, samples}` per round: the first, the last, and some between.

    Args:
        rounds: only these, first and last included; None = all.
        max_bytes: of the JSON; fewer rounds are shown to keep it.
    """
    files = sample_files(folder)
    if not files:
        notes.add("There are no samples: --samples-per-rollout-logged 0, or no round is done yet.")
    chosen = [key for key in files if rounds is None or rounds[0] <= key[0] <= rounds[1]]
    shown = [
        {"rollout_id": key[0], "evaluation": key[1], "samples": _read(files[key], notes)}
        for key in spread_out(chosen, _MAX_ROUNDS)
    ]
    while len(shown) > 1 and _num_bytes(shown) > max_bytes:
        shown = spread_out(shown, (len(shown) + 1) // 2)
    if len(shown) < len(chosen):
        notes.add(
            f"Samples of {len(shown)} of {len(chosen)} rounds are shown; --rounds FIRST:LAST shows "
            "others."
        )
    return shown


def staleness(folder: Path, notes: Notes) -> dict[str, Points]:
    """How old the weights of a round's first samples were; for runs whose ledger does not tell."""
    files = sample_files(folder)
    oldest: dict[int, list[float]] = {}
    for key in spread_out([key for key in files if not key[1]], _STALENESS_ROUNDS):
        rows = read_rows(files[key], notes, missing="no samples of this round")
        oldest[key[0]] = [min(found) for row in rows if (found := _versions(row))]
    return staleness_curves(oldest)


def staleness_curves(oldest: Mapping[int, Sequence[float]]) -> dict[str, Points]:
    """Updates between the oldest weights in a sample and those at the start of its round.

    Weights have the number of trained rounds + 1, so round r starts with version r + 1.

    Args:
        oldest: by round, the oldest version of each sample.
    """
    means: Points = []
    largest: Points = []
    for rollout_id, versions in sorted(oldest.items()):
        ages = [max(0.0, rollout_id + 1 - version) for version in versions]
        if ages:
            means.append((float(rollout_id), fmean(ages)))
            largest.append((float(rollout_id), max(ages)))
    return {"staleness/mean": means, "staleness/max": largest} if means else {}


def spread_out[T](items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of `items`, evenly spaced, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    if limit < 2:
        return list(items[-limit:]) if limit else []
    return [items[i * (len(items) - 1) // (limit - 1)] for i in range(limit)]


def sample_view(row: Mapping[str, Any]) -> Row:
    """One row of a samples file as the page wants it; rows of older runs have no tokens."""
    pieces = [str(piece) for piece in as_list(row.get("pieces"))][:_MAX_TOKENS]
    view: Row = {
        "index": as_round(row.get("index")),
        "group": as_round(row.get("group_index")),
        "prompt": _cut(_text(row.get("prompt"))),
        "label": None if row.get("label") is None else _cut(_text(row["label"])),
        "reward": _reward(row.get("reward")),
        "status": str(row.get("status", "")),
        "length": as_round(row.get("response_length")),
        "versions": [str(version) for version in as_list(row.get("weight_versions"))][:20],
        "removed": row.get("remove_sample") is True,
    }
    if not pieces:
        return view | {"response": _cut(_text(row.get("response")))}
    spans = as_list(row.get("version_spans"))
    if len(spans) > 1:
        view["spans"] = [
            [as_round(span[0]), str(span[1])] for span in map(as_list, spans) if len(span) == 2
        ]
    log_probs = as_list(row.get("rollout_log_probs"))[: len(pieces)]
    mask = as_list(row.get("loss_mask"))[: len(pieces)]
    if len(log_probs) == len(pieces):
        view["log_probs"] = [None if (x := as_number(v)) is None else short(x) for v in log_probs]
    if len(mask) == len(pieces):
        view["mask"] = [0 if value == 0 else 1 for value in mask]
    return view | {"pieces": pieces}


def _read(path: Path, notes: Notes) -> list[Row]:
    rows = read_rows(path, notes, missing="no samples of this round")
    return [sample_view(row) for row in rows[:_MAX_PER_ROUND]]


def _versions(row: Row) -> list[float]:
    found: Iterable[float | None] = map(as_number, as_list(row.get("weight_versions")))
    return [version for version in found if version is not None]


def _reward(value: Any) -> float | str | None:
    number = as_number(value)
    return short(number) if number is not None else None if value is None else _cut(_text(value))


def _text(value: Any) -> str:
    """Text as it is; messages and other values as indented JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)


def _cut(text: str) -> str:
    left = len(text) - _MAX_CHARS
    return text if left <= 0 else f"{text[:_MAX_CHARS]} ... ({left} more characters)"


def _num_bytes(value: object) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace"))
