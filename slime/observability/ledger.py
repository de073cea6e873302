"""The ledger of a run: one line per event, only ever appended, from prompt to optimizer step.

`ledger.jsonl` in the run folder, written by the driver alone. Every start of the run is an attempt;
it resumes after a checkpoint, and what earlier attempts did from there on no longer counts: it
stays in the file and is superseded. Events:

    attempt     number, first_rollout, time, host, pid
    rollout     a round as it was generated: per sample index, group, execution, response length,
                reward, status, oldest weight version and a digest of tokens and log-probs; per
                group its fate: accepted, dropped by a filter, or returned to the buffer
    train       which samples each optimizer step consumed
    checkpoint  everything up to this round is on disk; from train_async.py also which weights wrote
                the round after it
    end         the run came to its end
"""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from slime.errors import DataError

Event = dict[str, Any]


class Ledger:
    """Appends events to a ledger; each line reaches the operating system before the call returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._attempt = sum(event["event"] == "attempt" for event in read_events(path))
        content = path.read_bytes() if path.is_file() else b""
        if content and not content.endswith(b"\n"):
            self._write(b"\n")  # a killed run left half a line: it stays, on its own

    def attempt(self, first_rollout: int) -> int:
        """A start of the run at round `first_rollout`; returns the number of this attempt."""
        self._attempt += 1
        self._add(
            "attempt",
            number=self._attempt,
            first_rollout=first_rollout,
            time=round(time.time(), 3),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        return self._attempt

    def rollout(self, rollout_id: int, entry: Mapping[str, Any]) -> None:
        """A generated round; `entry` as `slime.orchestration.rounds.rollout_entry` makes it."""
        self._add("rollout", rollout_id=rollout_id, **entry)

    def train(self, rollout_id: int, steps: Sequence[Sequence[int]]) -> None:
        """A trained round: the index of each sample that each optimizer step consumed."""
        self._add("train", rollout_id=rollout_id, steps=[list(step) for step in steps])

    def checkpoint(self, rollout_id: int, folder: str, upcoming: str | None = None) -> None:
        """A whole checkpoint after round `rollout_id`.

        Args:
            upcoming: digest of the weights that wrote the next round, where it was begun before.
        """
        more = {} if upcoming is None else {"upcoming": upcoming}
        self._add("checkpoint", rollout_id=rollout_id, folder=folder, **more)

    def end(self) -> None:
        """The last round is done."""
        self._add("end")

    def _add(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values}, allow_nan=False, separators=(",", ":"))
        self._write(line.encode() + b"\n")

    def _write(self, data: bytes) -> None:
        with open(self._path, "ab", buffering=0) as file:
            file.write(data)


def read_events(path: Path) -> list[Event]:
    """Every event of a ledger, oldest first; none when there is no such file.

    Half a line, as a kill leaves it, is left out: at the end of the file, or before a new attempt.

    Raises:
        DataError: a line in the middle is damaged; names it.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    events: list[Event] = []
    torn: int | None = None
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        event = _parsed(line)
        if torn is not None and (event is None or event["event"] != "attempt"):
            raise DataError(
                f"{path} line {torn} is damaged and no new attempt follows it; the file was edited "
                "or the disk lost a part: the run cannot be proven from this ledger"
            )
        torn = number if event is None else None
        if event is not None:
            events.append(event)
    return events


def _parsed(line: bytes) -> Event | None:
    try:
        event: Any = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(cast(Event, event).get("event"), str):
        return None
    return cast(Event, event)


@dataclass
class Lineage:
    """The rounds that count, and what was superseded.

    Attributes:
        rollouts, trains: events by round; lists, as a healthy ledger has one of each.
        redone: earlier `rollout` events of rounds that a later attempt generated again.
        attempts: all attempt events.
        checkpoint: the last checkpoint that counts, or None.
        ended: whether the last attempt came to its end.
    """

    rollouts: dict[int, list[Event]] = field(default_factory=dict[int, list[Event]])
    trains: dict[int, list[Event]] = field(default_factory=dict[int, list[Event]])
    redone: list[Event] = field(default_factory=list[Event])
    attempts: list[Event] = field(default_factory=list[Event])
    checkpoint: Event | None = None
    ended: bool = False

    @property
    def next_rollout(self) -> int:
        """The round after the last one that was trained, or generated where nothing trains."""
        return max([*self.trains, *self.rollouts], default=-1) + 1


def lineage(events: Sequence[Event]) -> Lineage:
    """Replay the events: each attempt supersedes what lies at or after its first round."""
    line = Lineage()
    for event in events:
        match event["event"]:
            case "attempt":
                _supersede(line, event)
            case "rollout":
                line.rollouts.setdefault(event["rollout_id"], []).append(event)
            case "train":
                line.trains.setdefault(event["rollout_id"], []).append(event)
            case "checkpoint":
                line.checkpoint = event
            case "end":
                line.ended = True
            case _:  # an event of a later version
                pass
    return line


def _supersede(line: Lineage, attempt: Event) -> None:
    first: int = attempt["first_rollout"]
    line.attempts.append(attempt)
    line.ended = False
    line.redone += [e for r, found in line.rollouts.items() if r >= first for e in found]
    line.rollouts = {r: found for r, found in line.rollouts.items() if r < first}
    line.trains = {r: found for r, found in line.trains.items() if r < first}
    if line.checkpoint is not None and line.checkpoint["rollout_id"] >= first:
        line.checkpoint = None
