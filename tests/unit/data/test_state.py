from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.data.state import decode, encode, read_json, write_json
from slime.errors import CheckpointError

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.integers() | st.tuples(st.integers()), inner)
        | st.lists(st.floats(allow_nan=False))
        | st.fixed_dictionaries({"__slime__": inner})
    ),
    max_leaves=15,
)


@given(value=values)
def test_values_come_back_as_they_were(value: Any) -> None:
    again = decode(orjson.loads(orjson.dumps(encode(value))))
    assert again == value
    assert repr(again) == repr(value)  # == alone takes True for 1 and -0.0 for 0.0


@given(text=st.text(st.characters(codec=None)))
def test_text_with_half_surrogates_survives(text: str) -> None:
    written = orjson.dumps(encode({"response": text}))
    assert decode(orjson.loads(written)) == {"response": text}


def test_nan_infinity_and_arrays_survive() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    again = decode(encode([float("nan"), float("-inf"), array, np.float32(0.5), [1.5, -np.inf]]))
    assert np.isnan(again[0])
    assert again[1] == float("-inf")
    np.testing.assert_array_equal(again[2], array)
    assert again[2].dtype == np.int32
    assert again[2].flags.writeable
    assert again[3:] == [0.5, [1.5, float("-inf")]]


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()])])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="no place in a JSON file"):
        encode({"a": [value]})


def test_writing_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    assert [item.name for item in path.parent.iterdir()] == ["state.json"]


def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text('{"a": ')
    with pytest.raises(CheckpointError, match="damaged"):
        read_json(path)
