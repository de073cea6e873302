import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.rollout.admission import Bound


@pytest.mark.parametrize(
    ("weights", "next_round", "outstanding", "expected"),
    [(0, 0, 0, 12), (0, 1, 8, 0), (1, 1, 8, 4), (5, 5, 13, 0), (9, 9, 0, 4), (10, 10, 0, 0)],
)
def test_groups_may_be_begun_for_rounds_that_are_not_too_late(
    weights: int, next_round: int, outstanding: int, expected: int
) -> None:
    bound = Bound(batch=4, max_staleness=2, num_rollout=10)
    room = bound.room(weights=weights, next_round=next_round, outstanding=outstanding)
    assert room == expected


def test_a_round_takes_the_oldest_groups_and_of_those_the_first_that_were_whole() -> None:
    bound = Bound(batch=3, max_staleness=2, num_rollout=9)
    assert bound.choose([2, 1, 2, 1, 2]) == [0, 1, 3]


def test_a_round_waits_for_a_group_that_would_be_too_old_afterwards() -> None:
    bound = Bound(batch=2, max_staleness=2, num_rollout=9)
    assert bound.is_full(2, [1, 1], in_round=2)
    assert not bound.is_full(2, [0], in_round=2)
    assert not bound.is_full(1, [], in_round=2)


def test_a_round_waits_where_more_groups_would_stay_than_the_next_one_takes() -> None:
    bound = Bound(batch=2, max_staleness=2, num_rollout=9)
    assert not bound.is_full(2, [1, 1, 1], in_round=2)
    assert bound.is_full(2, [1, 2, 1, 2], in_round=2)
    assert not bound.is_full(2, [1, 2, 2, 2, 1], in_round=2)


@given(
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(0, 6),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_no_order_of_events_makes_a_group_too_old_and_every_round_comes(
    batch: int, max_staleness: int, interval: int, filler: int, places: int, random: object
) -> None:
    """Groups end in any order, filters drop some, syncs come late: the bound holds, and nothing hangs."""
    rng = random
    max_staleness = max(max_staleness, interval - 1)
    rounds = 6
    bound = Bound(batch, max_staleness, rounds)
    running: list[int] = []
    whole: list[int] = []
    weights, drops = 0, filler
    for number in range(rounds):
        trained, is_synced = number - 1, False
        while not bound.is_full(len(whole), running, number):
            room = bound.room(
                weights=weights, next_round=number, outstanding=len(running) + len(whole)
            )
            count = min(room, places - len(running))
            choices = ["begin"] * bool(count > 0) + ["end"] * bool(running)
            if trained >= 0 and not is_synced:
                choices.append("sync")
            assert choices, "nothing can happen any more, and the round is not there"
            match rng.choice(choices):  # type: ignore[attr-defined]
                case "begin":
                    running += [weights] * count
                case "end":
                    ended = running.pop(rng.randrange(len(running)))  # type: ignore[attr-defined]
                    if drops and rng.random() < 0.3:  # type: ignore[attr-defined]
                        drops -= 1
                    else:
                        whole.append(ended)
                case _:
                    is_synced = True
                    if number % interval == 0:
                        weights = number
        places_of = bound.choose(whole)
        assert all(not bound.is_too_old(whole[i], number) for i in places_of)
        assert len(places_of) == batch
        whole = [w for i, w in enumerate(whole) if i not in places_of]
        if not is_synced and number and number % interval == 0:
            weights = number
    assert not running
    assert not whole
