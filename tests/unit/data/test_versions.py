import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.data.sample import Sample
from slime.data.state import decode, encode
from slime.data.versions import (
    NOBODY,
    UNKNOWN,
    extended_spans,
    is_split_unknown,
    last_begin,
    num_policies,
    spans_of_answer,
    versions_in,
)
from slime.errors import DataError, EngineProtocolError

# How each token was written: by a version, by nobody, or by hand.
turns = st.lists(st.tuples(st.sampled_from(["3", "4", NOBODY]), st.integers(0, 4)), max_size=8)


def versions_of_tokens(spans: list[tuple[int, str]], length: int) -> list[str]:
    return [
        next(version for first, version in reversed(spans) if first <= token)
        for token in range(length)
    ]


@given(turns)
def test_every_token_is_told_the_version_that_wrote_it(written: list[tuple[str, int]]) -> None:
    sample, expected = Sample(tokens=[1]), list[str]()
    for version, count in written:
        sample.append_response_tokens(
            None,
            tokens=[7] * count,
            log_probs=None if version == NOBODY else [-1.0] * count,
            trainable=version != NOBODY,
            meta_info=None if version == NOBODY else {"weight_version": version},
        )
        expected += [version] * count
    sample.validate()
    assert versions_of_tokens(sample.version_spans, sample.response_length) == expected
    named = [version for _, version in sample.version_spans]
    assert all(one != other for one, other in itertools.pairwise(named))


def test_an_engine_that_lists_versions_is_believed() -> None:
    meta = {"weight_version": "5", "weight_versions": [["3", 0], ["4", 2], ["5", 2]]}
    sample = Sample(tokens=[1])
    sample.append_response_tokens(None, tokens=[7] * 4, log_probs=[-1.0] * 4, meta_info=meta)
    # Version 4 came and went between two tokens.
    assert sample.version_spans == [(0, "3"), (2, "5")]
    sample.append_response_tokens(None, tokens=[7], log_probs=[-1.0], meta_info=meta)
    assert sample.version_spans == [(0, "3"), (2, "5"), (4, "3")]


def test_tokens_that_were_filled_in_by_hand_are_not_claimed() -> None:
    sample = Sample(tokens=[1, 7, 7], response_length=2, rollout_log_probs=[-1.0] * 2)
    meta = {"weight_version": "3"}
    sample.append_response_tokens(None, tokens=[8], log_probs=[-1.0], meta_info=meta)
    assert sample.version_spans == [(0, UNKNOWN), (2, "3")]


@pytest.mark.parametrize(
    ("mode", "sent_under", "meta", "version"),
    [
        (None, "3", {}, "4"),
        ("abort", "3", {}, "4"),
        ("retract", "4", {}, "4"),
        ("retract", "3", {}, "3..4"),
        ("retract", "3", {"num_retractions": 0}, "4"),
        ("retract", "3", {"num_retractions": 1}, "3..4"),
        ("in_place", "3", {"num_retractions": 0}, "3..4"),
        ("in_place", "4", {"num_retractions": 0}, "4"),
        ("in_place", None, {}, "?..4"),
    ],
)
def test_a_split_that_nobody_knows_is_marked(
    mode: str | None, sent_under: str | None, meta: dict[str, Any], version: str
) -> None:
    answer = {"weight_version": 4, **meta}
    assert spans_of_answer(answer, pause_mode=mode, sent_under=sent_under) == [(0, version)]


def test_a_function_that_appends_itself_claims_no_more_than_is_known() -> None:
    sample, args = Sample(tokens=[1]), SimpleNamespace(update_weight_pause_mode="in_place")
    meta = {"weight_version": "4"}
    sample.append_response_tokens(args, tokens=[7], log_probs=[-1.0], meta_info=meta)
    assert sample.version_spans == [(0, "?..4")]
    assert is_split_unknown(sample.version_spans)
    assert not is_split_unknown([(0, "3"), (1, "4")])


def test_versions_are_counted_with_both_ends_of_a_mark() -> None:
    spans = [(0, "3..4"), (2, NOBODY), (3, UNKNOWN), (4, "4"), (9, "?..6")]
    assert list(versions_in(spans)) == ["3", "4", "4", "6"]
    assert num_policies(spans) == 3


def test_the_last_answer_begins_after_the_last_tool() -> None:
    assert last_begin([(0, "3"), (2, NOBODY), (4, "3"), (6, "4")], 9) == 4
    assert last_begin([(0, "3"), (2, NOBODY)], 9) == 9
    assert last_begin([(0, "3"), (2, "4")], 9) == 0
    assert last_begin([], 9) == 0


@pytest.mark.parametrize(
    "listed", ["3", [], [["3"]], [["3", 1]], [["3", 0], ["4", 5], ["5", 2]], [[None, 0]], {"3": 0}]
)
def test_a_list_that_is_none_is_refused(listed: Any) -> None:
    with pytest.raises(EngineProtocolError, match="weight_versions must be a list"):
        spans_of_answer({"weight_versions": listed})


def test_nothing_is_added_without_tokens() -> None:
    assert extended_spans([], 0, [(0, "3")], 0) == []


def test_spans_survive_every_way_to_disk() -> None:
    sample = Sample(tokens=[1, 2, 3], response_length=2, version_spans=[(0, "3"), (1, "4")])
    as_json = json.loads(json.dumps(sample.to_dict()))
    assert Sample.from_dict(as_json).version_spans == sample.version_spans
    assert Sample.from_dict(decode(encode(sample.to_dict()))) == sample


@pytest.mark.parametrize("spans", [[(2, "3")], [(0, "3"), (0, "4")], [(1, "3"), (0, "4")]])
def test_spans_that_do_not_fit_are_refused(spans: list[tuple[int, str]]) -> None:
    with pytest.raises(DataError, match="version_spans"):
        Sample(tokens=[1, 2, 3], response_length=2, version_spans=spans).validate()
