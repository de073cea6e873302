"""Entries of a round are checked as a few large arrays; what is wrong is still named by sample."""

import math
from typing import Any

import pytest

from slime.data.sample import Sample
from slime.errors import DataError
from slime.training.train_data import samples_to_train_data


def round_of(num_samples: int) -> list[Sample]:
    return [
        Sample(
            index=i,
            group_index=0,
            tokens=[5, 6, 7, 8],
            response_length=2,
            loss_mask=[1, 0],
            rollout_log_probs=[-0.5, -1],
            reward=1.0,
            status=Sample.Status.COMPLETED,
        )
        for i in range(num_samples)
    ]


def columns(samples: list[Sample]) -> dict[str, list[Any]]:
    ones = [1.0] * len(samples)
    return samples_to_train_data(samples, ones, ones)


def test_a_good_round_passes_with_its_own_lists() -> None:
    samples = round_of(3)
    samples[1].loss_mask = None
    data = columns(samples)
    assert data["tokens"] == [sample.tokens for sample in samples]
    assert data["loss_masks"] == [[1, 0], [1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", [5, 6, 7, -1]),
        ("tokens", [5, 6, 7, 8.5]),
        ("loss_mask", [1, 2]),
        ("rollout_log_probs", [-0.5, math.nan]),
        ("rollout_log_probs", [-0.5, None]),
        ("rollout_log_probs", ["-0.5", "-1"]),
    ],
)
def test_one_bad_entry_of_a_round_names_its_sample(name: str, value: list[Any]) -> None:
    samples = round_of(4)
    setattr(samples[2], name, value)
    with pytest.raises(DataError, match=f"sample 2: {name}"):
        columns(samples)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", (5, 6, 7)),
        ("tokens", "abcd"),
        ("response_length", 5),
        ("response_length", -1),
        ("response_length", True),
        ("loss_mask", [1]),
        ("rollout_log_probs", [-0.5, -1.0, -2.0]),
        ("teacher_log_probs", [-0.5]),
        ("rollout_top_p_token_offsets", [0, 1]),
        ("rollout_routed_experts", [[0]]),
        ("reward", math.nan),
    ],
)
def test_the_shortcut_past_validate_lets_nothing_through(name: str, value: Any) -> None:
    samples = round_of(3)
    setattr(samples[1], name, value)
    try:
        samples[1].validate()
        found = None
    except DataError as error:
        found = str(error)
    if found is None:
        columns(samples)
    else:
        with pytest.raises(DataError) as caught:
            columns(samples)
        assert str(caught.value) == found


def test_spans_of_versions_are_a_column_where_one_sample_has_several() -> None:
    samples = round_of(2)
    samples[0].version_spans = [(0, "3")]
    assert "version_spans" not in columns(samples)
    samples[1].version_spans = [(0, "3"), (1, "4")]
    assert columns(samples)["version_spans"] == [[(0, "3")], [(0, "3"), (1, "4")]]
