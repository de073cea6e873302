"""Proof from a ledger that no sample was lost, doubled or trained twice, also across kills."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from slime.observability.ledger import Event, Lineage, lineage

_SHOWN = 8


@dataclass(frozen=True)
class Audit:
    """What a ledger proves.

    Attributes:
        problems: everything that is not as it must be, a sentence each; empty for a clean ledger.
        notes: what cannot be proven here, or is worth knowing.
        counts: rounds, optimizer steps, samples, ... by name.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    counts: dict[str, int]

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def audit(events: Sequence[Event]) -> Audit:
    """Check every round that counts."""
    line = lineage(events)
    problems = [*_rounds(line), *_consumption(line), *_twice(line), *_groups(line)]
    return Audit(tuple(problems), tuple(_notes(line)), _counts(line))


def _rounds(line: Lineage) -> Iterator[str]:
    """Every round from the first to the last, once."""
    known = sorted(set(line.rollouts) | set(line.trains))
    if not known:
        return
    missing = sorted(set(range(known[0], known[-1] + 1)) - set(known))
    if missing:
        yield f"rounds {_some(missing)} are missing between {known[0]} and {known[-1]}"
    for rollout_id in known:
        for what, found in (("generated", line.rollouts), ("trained", line.trains)):
            count = len(found.get(rollout_id, ()))
            if count > 1:
                yield f"round {rollout_id} was {what} {count} times in one attempt"
            if count == 0 and (what == "generated" or line.trains):
                yield f"round {rollout_id} has no record of having been {what}"


def _consumption(line: Lineage) -> Iterator[str]:
    """The samples of a round are those its optimizer steps consumed."""
    for rollout_id, rollout, train in _pairs(line):
        if rollout["is_converted"]:
            continue  # a user's function made the train data: its rows have numbers of their own
        made = Counter[int](rollout["samples"]["index"])
        left_over = Counter[int](rollout["unused"])
        used = Counter[int](index for step in train["steps"] for index in step)
        if lost := made - used - left_over:
            yield f"round {rollout_id}: samples {_some(lost)} were generated and never trained"
        if doubled := (used + left_over) - made:
            yield f"round {rollout_id}: samples {_some(doubled)} were trained more often than generated"


def _twice(line: Lineage) -> Iterator[str]:
    """No sample is trained in two rounds."""
    owner: dict[int, int] = {}
    repeated: dict[tuple[int, int], list[int]] = {}
    for rollout_id, rollout, _ in _pairs(line):
        if not rollout["is_numbered"]:
            continue
        for index in dict.fromkeys(rollout["samples"]["index"]):
            if (before := owner.setdefault(index, rollout_id)) != rollout_id:
                repeated.setdefault((before, rollout_id), []).append(index)
    for (before, rollout_id), indexes in repeated.items():
        yield f"samples {_some(indexes)} were trained twice: in rounds {before} and {rollout_id}"


def _groups(line: Lineage) -> Iterator[str]:
    """Every prompt group that was taken from the data is accepted, dropped or in the buffer."""
    waiting: set[int] = set()
    for rollout_id in sorted(line.rollouts):
        rollout = line.rollouts[rollout_id][0]
        taken = rollout.get("taken")
        if taken is None:
            return
        came = waiting | set(range(taken[0], taken[1]))
        accepted = {group for group in rollout["samples"]["group"] if group is not None}
        dropped = {group for groups in rollout["dropped"].values() for group in groups}
        returned = set(rollout["returned"])
        if strange := sorted((accepted | dropped | returned) - came):
            yield f"round {rollout_id}: groups {_some(strange)} came from nowhere"
        gone = came - waiting - accepted - dropped - returned
        if gone:
            yield f"round {rollout_id}: groups {_some(sorted(gone))} were taken and lost"
        waiting = (came - accepted - dropped) & (waiting | returned)


def _notes(line: Lineage) -> Iterator[str]:
    for before, attempt in zip(line.attempts, line.attempts[1:], strict=False):
        yield (
            f"attempt {attempt['number']} went on at round {attempt['first_rollout']} (attempt "
            f"{before['number']} had begun at {before['first_rollout']})"
        )
    same, other = _compare_redone(line)
    if same:
        yield f"{same} rounds were done again after a kill with the same samples, bit for bit"
    if other:
        yield f"rounds {_some(other)} were done again with other samples than before the kill"
    if any(rollout[0].get("taken") is None for rollout in line.rollouts.values()):
        yield "the data source does not number its groups: lost prompts cannot be proven"
    if line.rollouts and not line.trains:
        yield "nothing was trained in this run"
    if not line.ended:
        yield "the run has not come to its end"


def _compare_redone(line: Lineage) -> tuple[int, list[int]]:
    same, other = 0, list[int]()
    for event in line.redone:
        if (found := line.rollouts.get(event["rollout_id"])) is None:
            continue
        if found[0]["samples"] == event["samples"]:
            same += 1
        else:
            other.append(event["rollout_id"])
    return same, sorted(set(other))


def _counts(line: Lineage) -> dict[str, int]:
    rollouts = [found[0] for found in line.rollouts.values()]
    trains = [found[0] for found in line.trains.values()]
    return {
        "attempts": len(line.attempts),
        "rounds": len(rollouts),
        "optimizer_steps": sum(len(train["steps"]) for train in trains),
        "samples": sum(len(rollout["samples"]["index"]) for rollout in rollouts),
        "trained": sum(len(step) for train in trains for step in train["steps"]),
        "failed": sum(rollout["samples"]["status"].count("failed") for rollout in rollouts),
        "dropped_groups": sum(
            len(groups) for rollout in rollouts for groups in rollout["dropped"].values()
        ),
        "superseded_rounds": len(line.redone),
    }


def _pairs(line: Lineage) -> Iterator[tuple[int, Event, Event]]:
    """(round, its rollout event, its train event) of every round that has both."""
    for rollout_id in sorted(set(line.rollouts) & set(line.trains)):
        yield rollout_id, line.rollouts[rollout_id][0], line.trains[rollout_id][0]


def _some(items: Iterable[Any]) -> str:
    found = list(items)
    shown = ", ".join(map(str, found[:_SHOWN]))
    return shown if len(found) <= _SHOWN else f"{shown} and {len(found) - _SHOWN} more"
