"""The order in which trainer and engines hand over the memory of shared devices."""

import time
from typing import Any

import pytest

from slime.observability.phases import Phase, clock, phase, sum_of
from slime.orchestration.turns import Turns


class FakeRemote:
    """A method of a Ray actor that notes its calls."""

    def __init__(self, calls: list[str], name: str) -> None:
        self._calls, self._name = calls, name

    def remote(self, tags: tuple[str, ...] = ()) -> None:
        self._calls.append(" ".join([self._name, *tags]))


class FakeManager:
    def __init__(self, calls: list[str]) -> None:
        self.release_engines = FakeRemote(calls, "engines leave")
        self.resume_engines = FakeRemote(calls, "engines take")


class FakeTrainers:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def sleep(self) -> None:
        self._calls.append("trainer leaves")

    def wake_up(self) -> None:
        self._calls.append("trainer returns")


def turns(calls: list[str], *, trainer_leaves: bool = True, engines_leave: bool = True) -> Turns:
    group: Any = FakeTrainers(calls)
    return Turns(
        FakeManager(calls),
        group,
        trainer_leaves=trainer_leaves,
        engines_leave=engines_leave,
        wait=lambda call, action: None,
    )


def a_start_and_a_round(on: Turns, calls: list[str]) -> None:
    on.trainers()
    calls.append("load")
    with on.sync():
        calls.append("sync")
    calls.append("generate")
    on.trainers()
    calls.append("train")
    with on.sync():
        calls.append("sync")
    with on.save():
        calls.append("save")


def test_neither_side_holds_memory_that_the_other_needs() -> None:
    calls: list[str] = []
    a_start_and_a_round(turns(calls), calls)
    assert calls == [
        "engines leave",  # they came first, and took what was free
        "load",
        "engines take weights",
        "sync",
        "trainer leaves",
        "engines take kv_cache cuda_graph",
        "generate",
        "engines leave",
        "trainer returns",
        "train",
        "engines take weights",
        "sync",
        "trainer leaves",
        "engines take kv_cache cuda_graph",
        "engines leave kv_cache cuda_graph",
        "trainer returns",
        "save",
        "trainer leaves",
        "engines take kv_cache cuda_graph",
    ]


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        ({"engines_leave": False}, ["trainer leaves", "generate", "trainer returns"]),
        (
            {"trainer_leaves": False},
            ["engines take kv_cache cuda_graph", "generate", "engines leave"],
        ),
    ],
)
def test_one_side_alone_can_give_way(leaves: dict[str, bool], expected: list[str]) -> None:
    calls: list[str] = []
    a_start_and_a_round(turns(calls, **leaves), calls)
    place = calls.index("generate")
    assert calls[place - 1 : place + 2] == expected


def test_devices_of_their_own_are_never_left() -> None:
    calls: list[str] = []
    a_start_and_a_round(turns(calls, trainer_leaves=False, engines_leave=False), calls)
    assert calls == ["load", "sync", "generate", "train", "sync", "save"]


def test_handing_over_is_time_of_its_own() -> None:
    seconds = 0.02

    class SlowTrainers(FakeTrainers):
        def sleep(self) -> None:
            time.sleep(seconds)
            super().sleep()

    calls: list[str] = []
    group: Any = SlowTrainers(calls)
    on = Turns(
        FakeManager(calls),
        group,
        trainer_leaves=True,
        engines_leave=True,
        wait=lambda call, action: time.sleep(seconds),
    )
    with clock.record() as segments, phase(Phase.SYNC), on.sync():
        time.sleep(seconds)
    spent = sum_of(segments)
    assert calls == ["trainer leaves"]  # the engines had not left
    assert min(spent[Phase.OFFLOAD], spent[Phase.SYNC]) >= seconds
    with clock.record() as segments:
        on.trainers()  # engines leave, the trainer returns
        with (
            phase(Phase.SYNC),
            on.sync(),
        ):  # engines take weights, the trainer leaves, engines the rest
            pass
    assert sum_of(segments)[Phase.OFFLOAD] >= 4 * seconds
