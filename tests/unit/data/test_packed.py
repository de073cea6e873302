"""Packed: lists of numbers as arrays, and back exactly."""

import copy
import dataclasses
import math
import pickle
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.data.packed import LEAST, Packed
from slime.data.sample import Sample
from slime.data.state import decode, encode
from slime.errors import DataError
from slime.orchestration.rounds import sample_digest
from slime.training.train_data import complete_train_data, samples_to_train_data

IDS = st.lists(st.integers(0, 151_935), min_size=1)
LOG_PROBS = st.lists(st.floats(width=32) | st.floats(), min_size=1)


def bits(row: list[float]) -> list[bytes]:
    return [struct.pack("<d", value) for value in row]


@given(IDS)
def test_ids_come_back_as_they_were(row: list[int]) -> None:
    packed = Packed.of(row)
    assert packed is not None
    assert packed.array.dtype == np.int32
    assert packed.tolist() == row
    assert set(map(type, packed.tolist())) == {int}


@given(LOG_PROBS)
def test_log_probs_come_back_bit_for_bit(row: list[float]) -> None:
    packed = Packed.of(row)
    assert packed is not None
    # Which nan it is does not survive where it goes through fp32, and nothing asks.
    assert bits([0.0 if math.isnan(x) else x for x in packed.tolist()]) == bits(
        [0.0 if math.isnan(x) else x for x in row]
    )


def test_log_probs_of_engines_need_four_bytes_and_others_eight() -> None:
    engine = [float(np.float32(-0.1 * i)) for i in range(600)]
    assert (found := Packed.of(engine)) is not None
    assert found.array.dtype == np.float32
    assert (found := Packed.of([*engine, -0.1])) is not None
    assert found.array.dtype == np.float64


@pytest.mark.parametrize(
    "row", [[], [1, 2.0], [True, False], [None], [np.int64(3)], [2**70], ["a"]]
)
def test_what_would_not_come_back_as_it_is_stays_a_list(row: list[Any]) -> None:
    assert Packed.of(row) is None


def test_large_whole_numbers_take_eight_bytes() -> None:
    assert (found := Packed.of([2**40, -1])) is not None
    assert found.tolist() == [2**40, -1]


def answered(length: int = 2 * LEAST, **fields: Any) -> Sample:
    return Sample(
        index=3,
        group_index=1,
        tokens=list(range(5 + length)),
        response_length=length,
        rollout_log_probs=[float(np.float32(-i / 7)) for i in range(length)],
        reward=1.0,
        status=Sample.Status.COMPLETED,
        **fields,
    )


def test_a_reader_gets_the_list_and_may_change_it() -> None:
    sample, plain = answered(), answered()
    sample.pack()
    assert isinstance(vars(sample)["tokens"], Packed)
    assert sample.tokens == plain.tokens
    sample.tokens.append(7)
    assert sample.tokens == [*plain.tokens, 7]
    assert vars(sample)["tokens"] is sample.tokens


def test_short_lists_stay_lists() -> None:
    sample = answered(LEAST - 10)
    sample.pack()
    assert type(vars(sample)["tokens"]) is list


def test_a_packed_sample_is_equal_to_itself_however_it_is_looked_at() -> None:
    plain, packed = answered(loss_mask=[1, 0] * LEAST), answered(loss_mask=[1, 0] * LEAST)
    packed.pack()
    assert packed.prompt_length == 5
    assert packed.effective_response_length == LEAST
    packed.validate(vocab_size=10_000)
    assert sample_digest(packed) == sample_digest(plain)
    assert all(isinstance(vars(packed)[name], Packed) for name in ("tokens", "loss_mask"))
    for twin in (copy.deepcopy(packed), copy.copy(packed), pickle.loads(pickle.dumps(packed))):
        assert twin == plain
    assert packed.to_dict() == plain.to_dict()
    assert dataclasses.asdict(packed) == dataclasses.asdict(plain)
    assert dataclasses.replace(packed, reward=0.0) == dataclasses.replace(plain, reward=0.0)


def test_a_copy_that_is_changed_leaves_the_other_alone() -> None:
    sample = answered()
    sample.pack()
    twin = copy.copy(sample)
    twin.tokens[0] = 99
    assert sample.tokens[0] == 0


def test_what_is_kept_packed_is_the_same_json_and_the_same_sample() -> None:
    plain, packed = answered(), answered()
    packed.pack()
    kept = packed.to_dict_packed()
    packed.tokens[0] = 99
    assert encode(kept) == encode(plain.to_dict())
    assert Sample.from_dict(decode(encode(kept))) == plain


def test_validate_finds_what_is_wrong_in_a_packed_list() -> None:
    sample = answered()
    sample.tokens[3] = -1
    sample.pack()
    with pytest.raises(DataError, match=r"tokens\[3\] is -1"):
        sample.validate()
    short = answered()
    short.rollout_log_probs = [-0.5] * (2 * LEAST - 1)
    short.pack()
    with pytest.raises(DataError, match=f"rollout_log_probs has {2 * LEAST - 1} entries"):
        short.validate()


def test_training_data_of_packed_samples_is_that_of_plain_ones() -> None:
    def columns(*, packs: bool) -> dict[str, Any]:
        samples = [
            answered(),
            answered(loss_mask=[1, 0] * LEAST),
            answered(30),
            answered(remove_sample=True),
        ]
        for index, sample in enumerate(samples):
            sample.index = index
            if packs:
                sample.pack()
        data = samples_to_train_data(samples, [1.0] * 4, [1.0] * 4)
        assert not packs or type(vars(samples[0])["tokens"]) is Packed
        return complete_train_data(data)

    plain, packed = columns(packs=False), columns(packs=True)
    assert sorted(plain) == sorted(packed)
    for name, column in plain.items():
        for ours, theirs in zip(packed[name], column, strict=True):
            assert np.array_equal(np.asarray(ours), np.asarray(theirs)), name


def test_a_bad_entry_of_a_packed_sample_is_found_among_good_ones() -> None:
    good, bad = answered(), answered()
    bad.tokens[7] = -4
    for sample in (good, bad):
        sample.pack()
    with pytest.raises(DataError, match=r"tokens\[7\] is -4"):
        samples_to_train_data([good, bad], [1.0, 1.0], [1.0, 1.0])


def test_appending_to_a_packed_sample_goes_on_from_its_list() -> None:
    sample = answered()
    sample.pack()
    sample.append_response_tokens(SimpleNamespace(), tokens=[1, 2], trainable=False, text="x")
    assert sample.tokens[-2:] == [1, 2]
    assert sample.loss_mask == [1] * (2 * LEAST) + [0, 0]
    sample.validate()


def test_a_class_of_a_user_keeps_its_defaults() -> None:
    @dataclasses.dataclass
    class Mine(Sample):
        loss_mask: list[int] | None
        more: int = 4

    mine = Mine(tokens=[1] * LEAST)
    assert (mine.loss_mask, mine.more, Mine().tokens) == (None, 4, [])
    mine.pack()
    assert mine.tokens == [1] * LEAST
    assert Sample.loss_mask is None
    assert not hasattr(Sample, "tokens")
