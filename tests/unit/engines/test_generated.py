import math
from typing import Any

import pytest

from slime.engines.generated import Limits, output_ids
from slime.errors import EngineProtocolError

LIMITS = Limits(max_new_tokens=4, vocab_size=10)
GOOD = [[-0.5, 3, None], [-1e-9, 0, None], [0.0, 9, None]]


def answer(entries: Any) -> dict[str, Any]:
    return {"meta_info": {"output_token_logprobs": entries}}


@pytest.mark.parametrize("entries", [GOOD, [tuple(entry) for entry in GOOD], [[-1, 3], *GOOD[1:]]])
def test_good_entries_give_their_ids(entries: list[Any]):
    assert output_ids(answer(entries), LIMITS, where="POST /generate") == [3, 0, 9]


def test_log_probs_whose_sum_leaves_the_floats_are_numbers_all_the_same():
    entries = [[-1.7e308, 1, None], [-1.7e308, 2, None]]
    assert output_ids(answer(entries), LIMITS, where="POST /generate") == [1, 2]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([math.nan, 3, None], "log-prob nan at position {}"),
        ([math.inf, 3, None], "log-prob inf at position {}"),
        ([-math.inf, 3, None], "log-prob -inf at position {}"),
        ([0.5, 3, None], "log-prob 0.5 at position {}"),
        ([True, 3, None], "log-prob True at position {}"),
        ([-0.5, -1, None], "token id -1 at position {}"),
        ([-0.5, 10, None], "token id 10 at position {}"),
        ([-0.5, True, None], "at position {}"),
        ([-0.5, 3.0, None], "at position {}"),
        ([-0.5], "at position {}"),
        ("ab", "at position {}"),
        (None, "at position {}"),
    ],
)
def test_one_bad_entry_is_named_with_its_place(place: int, bad: Any, message: str):
    entries = [*GOOD[:place], bad, *GOOD[place + 1 :]]
    with pytest.raises(EngineProtocolError, match=message.format(place)):
        output_ids(answer(entries), LIMITS, where="POST /generate")


def test_two_infinities_do_not_make_each_other_good():
    entries = [[-0.5, 1, None], [math.inf, 2, None], [-math.inf, 3, None]]
    with pytest.raises(EngineProtocolError, match="log-prob inf at position 1"):
        output_ids(answer(entries), LIMITS, where="POST /generate")


def test_ids_of_a_vocabulary_beyond_belief_are_kept_as_they_are():
    assert output_ids(answer([[-0.5, 2**40, None]]), Limits(), where="") == [2**40]
