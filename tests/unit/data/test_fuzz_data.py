"""Whatever a prompt file, a sample's dict or a mask holds: a right value, or a DataError with its place."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_tokenizer import make_char_tokenizer

from slime.data.chat import load_tokenizer
from slime.data.dataset import Dataset, DatasetSpec
from slime.data.sample import Sample
from slime.data.state import decode, encode
from slime.errors import DataError

BOUNDED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "tool_calls", "name"]), JSON, max_size=3
) | st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.text(max_size=8) | JSON}
)
ROW = st.dictionaries(
    st.sampled_from(["input", "label", "metadata", "tools", "other"]),
    JSON | st.lists(MESSAGE, max_size=3),
    max_size=5,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(make_char_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def read(path: Path, tokenizer: Any, *, template: bool) -> None:
    """A dataset whose samples can be made, or a DataError that names the file."""
    spec = DatasetSpec(path=str(path), apply_chat_template=template)
    message = ""
    try:
        data = Dataset(spec, tokenizer)
        for i in range(len(data)):
            data.sample(i).validate()
    except DataError as error:
        message = str(error)
    assert not message or str(path) in message
    assert len(message) < 2000


@BOUNDED
@given(content=st.binary(max_size=60))
def test_any_bytes(content: bytes, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    read(path, tokenizer, template=False)


@BOUNDED
@given(rows=st.lists(ROW | JSON, min_size=1, max_size=3), template=st.booleans())
def test_any_rows(rows: list[Any], template: bool, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read(path, tokenizer, template=template)


@BOUNDED
@given(content=st.binary(max_size=40))
def test_any_bytes_as_parquet(content: bytes, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + content + b"PAR1")
    read(path, tokenizer, template=False)


@BOUNDED
@given(value=JSON)
def test_state_survives_the_way_to_disk_and_back(value: Any) -> None:
    assert repr(decode(json.loads(json.dumps(encode(value))))) == repr(value)


FIELDS = ("tokens", "response_length", "loss_mask", "rollout_log_probs", "reward")


@BOUNDED
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(JSON, max_size=4)))
def test_a_sample_of_any_values_is_right_or_refused(changes: dict[str, Any]) -> None:
    sample = Sample(tokens=[1, 2, 3], response_length=1)
    vars(sample).update(changes)
    try:
        sample.validate(vocab_size=10)
    except DataError:
        return
    assert all(0 <= token < 10 for token in sample.tokens)
    assert all(entry in (0, 1) for entry in sample.loss_mask or [])


@BOUNDED
@given(data=st.dictionaries(st.sampled_from([*FIELDS, "status", "spec_info", "extra"]), JSON))
def test_a_sample_of_any_dict_is_made_or_refused(data: dict[str, Any]) -> None:
    try:
        sample = Sample.from_dict(data)
    except DataError:
        return
    assert isinstance(sample.status, Sample.Status)
