"""The ledger keeps every event, knows what a resume supersedes, and its audit names what is wrong."""

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.errors import DataError
from slime.observability.ledger import Ledger, lineage, read_events
from slime.observability.ledger_audit import audit

G = 2


def entry(groups: list[int], *, taken: tuple[int, int], **more: Any) -> dict[str, Any]:
    indexes = [group * G + i for group in groups for i in range(G)]
    count = len(indexes)
    samples = {
        "index": indexes,
        "group": [group for group in groups for _ in range(G)],
        "execution": [None] * count,
        "length": [3] * count,
        "reward": [1.0] * count,
        "status": ["completed"] * count,
        "version": [1] * count,
        "digest": [f"{i:016x}" for i in indexes],
    }
    base = {"dropped": {}, "returned": [], "unused": [], "is_numbered": True, "is_converted": False}
    return {"samples": samples, "taken": list(taken), **base, **more}


def add_round(ledger: Ledger, rollout_id: int, groups: list[int], **more: Any) -> None:
    taken = more.pop("taken", (min(groups), max(groups) + 1))
    made = entry(groups, taken=taken, **more)
    ledger.rollout(rollout_id, made)
    ledger.train(rollout_id, [made["samples"]["index"]])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def clean(path: Path) -> list[dict[str, Any]]:
    """Three rounds; the third was done twice, as the run was killed after the second checkpoint."""
    first = Ledger(path)
    first.attempt(0)
    for rollout_id in range(3):
        add_round(first, rollout_id, [2 * rollout_id, 2 * rollout_id + 1])
        if rollout_id == 1:
            first.checkpoint(1, "ckpt")
    second = Ledger(path)
    assert second.attempt(2) == 2
    add_round(second, 2, [4, 5])
    second.end()
    return read_events(path)


def test_a_clean_ledger_is_clean_and_says_what_was_done_again(clean: list[dict[str, Any]]) -> None:
    result = audit(clean)
    assert result.problems == ()
    assert result.counts["rounds"] == 3
    assert result.counts["trained"] == 12
    assert result.counts["superseded_rounds"] == 1
    assert any("same samples, bit for bit" in note for note in result.notes)


def test_rounds_after_the_resume_point_are_superseded(clean: list[dict[str, Any]]) -> None:
    line = lineage(clean)
    assert [len(found) for found in line.rollouts.values()] == [1, 1, 1]
    assert line.ended
    assert line.checkpoint is not None


def last_train(events: list[dict[str, Any]]) -> dict[str, Any]:
    return [event for event in events if event["event"] == "train"][-1]


def last_rollout(events: list[dict[str, Any]]) -> dict[str, Any]:
    return [event for event in events if event["event"] == "rollout"][-1]


def lose_a_sample(events: list[dict[str, Any]]) -> None:
    last_train(events)["steps"][0].remove(9)


def train_one_doubly(events: list[dict[str, Any]]) -> None:
    last_train(events)["steps"].append([9])


def train_an_old_one_again(events: list[dict[str, Any]]) -> None:
    last_rollout(events)["samples"]["index"][0] = 0
    last_train(events)["steps"][0][0] = 0


def lose_a_prompt(events: list[dict[str, Any]]) -> None:
    last_rollout(events)["taken"] = [4, 7]


def invent_a_prompt(events: list[dict[str, Any]]) -> None:
    last_rollout(events)["taken"] = [4, 5]


def skip_a_round(events: list[dict[str, Any]]) -> None:
    events[:] = [event for event in events if event.get("rollout_id") != 1]


def train_nothing(events: list[dict[str, Any]]) -> None:
    del events[max(i for i, event in enumerate(events) if event["event"] == "train")]


def generate_twice(events: list[dict[str, Any]]) -> None:
    events.insert(-1, copy.deepcopy(last_rollout(events)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_a_sample, "samples 9 were generated and never trained"),
        (train_one_doubly, "samples 9 were trained more often than generated"),
        (train_an_old_one_again, "samples 0 were trained twice: in rounds 0 and 2"),
        (lose_a_prompt, "groups 6 were taken and lost"),
        (invent_a_prompt, "groups 5 came from nowhere"),
        (skip_a_round, "rounds 1 are missing"),
        (train_nothing, "round 2 has no record of having been trained"),
        (generate_twice, "round 2 was generated 2 times"),
    ],
)
def test_damage_is_named(clean: list[dict[str, Any]], damage: Any, words: str) -> None:
    events = copy.deepcopy(clean)
    damage(events)
    assert any(words in problem for problem in audit(events).problems), audit(events).problems


def test_buffered_and_dropped_groups_are_accounted_for(path: Path) -> None:
    ledger = Ledger(path)
    ledger.attempt(0)
    add_round(ledger, 0, [0, 3], taken=(0, 4), dropped={"zero_std": [1]}, returned=[2])
    add_round(ledger, 1, [2, 4], taken=(4, 5))
    assert audit(read_events(path)).problems == ()
    add_round(ledger, 2, [5], taken=(5, 7))
    assert audit(read_events(path)).problems == ("round 2: groups 6 were taken and lost",)


def test_half_a_line_of_a_killed_run_is_left_out_and_stays_in_the_file(path: Path) -> None:
    ledger = Ledger(path)
    ledger.attempt(0)
    add_round(ledger, 0, [0])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event":"rollout","rollo')
    assert len(read_events(path)) == 3
    again = Ledger(path)
    again.attempt(1)
    assert [event["event"] for event in read_events(path)].count("attempt") == 2
    assert path.read_bytes().startswith(whole)


def test_a_damaged_line_in_the_middle_is_named(path: Path) -> None:
    ledger = Ledger(path)
    ledger.attempt(0)
    add_round(ledger, 0, [0])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"xxxx\n" + lines[2])
    with pytest.raises(DataError, match="line 2 is damaged"):
        read_events(path)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "ledger.jsonl"
    path.write_bytes(data)
    with suppress(DataError):
        read_events(path)
