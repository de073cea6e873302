"""The quickstart's tiny model, and what a finished train.py left."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from slime.observability.trackers import read_metrics

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
# For a run that hangs: the longest, with two SGLang servers, took 128 s on two idle cores, and 240 were once too few.
RUN_TIMEOUT_S = 600

MODEL_ARGS = shlex.split(
    """
    --num-layers 2 --hidden-size 96 --ffn-hidden-size 288 --num-attention-heads 3
    --group-query-attention --num-query-groups 1 --kv-channels 32
    --qk-layernorm --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
    --use-rotary-position-embeddings --rotary-base 10000 --vocab-size 58
    """
)


@dataclass(frozen=True)
class Work:
    """Folder with `model/` and `data/`."""

    path: Path


@dataclass(frozen=True)
class Run:
    """A finished train.py."""

    folder: Path
    code: int
    output: str

    def series(self, name: str) -> list[float]:
        """Values of one metric, in the order they were logged."""
        return [row[name] for row in read_metrics(self.folder / "metrics.jsonl") if name in row]


def phases_of(run: Run, side: str) -> list[dict[str, float]]:
    """Seconds per phase of one side (`round`, `trainer`, `engines`), round after round."""
    prefix, suffix = f"perf/{side}/", "_time"
    return [
        {
            name[len(prefix) : -len(suffix)]: value
            for name, value in row.items()
            if name.startswith(prefix) and name.endswith(suffix)
        }
        for row in read_metrics(run.folder / "metrics.jsonl")
        if f"{prefix}idle_time" in row
    ]


def assert_side_adds_up(run: Run, side: str, number: int) -> None:
    """A side's phases add up to the driver's round, up to the time the driver took to ask.

    All sides' rounds end while it asks, not at one moment: a slow answer lengthens the round before
    it, and shortens the one after, for some of them.
    """
    spans = (run.folder / "timeline" / "driver.jsonl").read_text().splitlines()
    waits = [
        span["end"] - span["start"]
        for span in map(json.loads, spans)
        if span["name"] == "wait_times"  # the first one is before the first round
    ]
    rounds = phases_of(run, "round")
    assert len(waits) >= len(rounds) + 1
    whole, found = (sum(phases_of(run, one)[number].values()) for one in ("round", side))
    rounding_s = 0.001  # of spans
    assert -waits[number + 1] - rounding_s <= found - whole <= waits[number] + rounding_s
