"""Published conversations as SFT data: what is kept, what is dropped, and files that are not whole."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.data import json_array as reader
from slime.data.conversations import Dropped, convert_conversations, messages_of
from slime.data.dataset import read_rows
from slime.data.json_array import json_array
from slime.errors import DataError


def turn(role: str, text: Any) -> dict[str, Any]:
    return {"from": role, "value": text}


# As in openhermes2_5.json: the columns beside `conversations`, null mostly, and a weight in a turn.
ROWS: list[dict[str, Any]] = [
    {
        "custom_instruction": None,
        "topic": None,
        "model": "gpt-4",
        "category": "orca",
        "source": "airoboros2.2",
        "system_prompt": None,
        "skip_prompt_formatting": False,
        "idx": None,
        "conversations": [
            turn("system", "Be brief."),
            turn("human", "Zwei plus zwei? \U0001f600"),
            {**turn("gpt", 'Vier, or "4" \\ {[}]'), "weight": 1.0},
        ],
    },
    {
        "source": "CamelAI",
        "conversations": [
            turn("human", "Hi"),
            turn("gpt", "Hi."),
            turn("human", "And?"),
            turn("gpt", "No\u2028more."),
        ],
    },
    {"source": "glaive", "conversations": [turn("human", "What?"), turn("gpt", " \n")]},
    {"source": "glaive", "conversations": [turn("human", "What?"), turn("tool", "4")]},
    {"source": "x", "conversations": [turn("human", "What?")]},
    {"source": "x", "conversations": [turn("gpt", "Hello.")]},
    {"source": "x", "conversations": []},
    {"source": "x", "conversations": None},
]
KEPT = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Zwei plus zwei? \U0001f600"},
        {"role": "assistant", "content": 'Vier, or "4" \\ {[}]'},
    ],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No\u2028more."},
    ],
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """The rows in the form that the suffix names."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def found(path: Path) -> list[list[dict[str, Any]]]:
    return [row["messages"] for _, row in read_rows(str(path))]


@pytest.mark.parametrize("target", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("source", ["openhermes2_5.json", "in.jsonl", "in.parquet"])
def test_every_form_becomes_messages(tmp_path: Path, source: str, target: str) -> None:
    done = convert_conversations(write(tmp_path / source), tmp_path / "made" / target)
    assert found(tmp_path / "made" / target) == KEPT
    assert (done.num_read, done.num_written) == (8, 2)
    assert done.dropped == {
        "no conversation": 2,
        "an empty turn": 1,
        "a role other than system, human, gpt": 1,
        "not ending in an assistant turn": 1,
        "beginning with an assistant turn": 1,
    }
    if source.endswith(".json"):
        assert done.first["an empty turn"] == f"{tmp_path / source}[2]"
    assert sum(done.dropped.values()) + done.num_written == done.num_read
    assert [path.name for path in (tmp_path / "made").iterdir()] == [target]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("text", "no conversation"),
        ([turn("human", "a"), "b"], "a turn that is no object"),
        ([turn("human", "a"), turn("gpt", None)], "an empty turn"),
        ([turn("human", "\ud83d"), turn("gpt", "b")], "text that UTF-8 cannot hold"),
        ([turn("system", "a"), turn("gpt", "b")], "beginning with an assistant turn"),
        ([turn("human", "a"), turn("system", "b"), turn("gpt", "c")], "a system turn that is not"),
        ([{"value": "a"}], "a role other than system, human, gpt"),
        ([{"from": ["human"], "value": "a"}], "a role other than"),
    ],
)
def test_why_a_conversation_is_dropped(turns: Any, reason: str) -> None:
    with pytest.raises(Dropped, match=reason):
        messages_of(turns)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("mine")
    with pytest.raises(DataError, match="is there already"):
        convert_conversations(write(tmp_path / "in.json"), target)
    assert target.read_text() == "mine"


@pytest.mark.parametrize("target", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("keep", [0.95, 0.5])
def test_a_file_cut_off_leaves_nothing_behind(tmp_path: Path, target: str, keep: float) -> None:
    source = write(tmp_path / "in.json", ROWS[:2] * 50)
    text = source.read_text(encoding="utf-8")
    source.write_text(text[: int(len(text) * keep)], encoding="utf-8")
    with pytest.raises(DataError, match=r"no whole JSON array of objects: .*element \d+"):
        convert_conversations(source, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


def test_rows_of_another_data_set_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"messages": KEPT[0]}])
    with pytest.raises(DataError, match=r"none of 1 rows is of use: \{'no conversation': 1\}"):
        convert_conversations(source, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match=r"the output is \.jsonl or \.parquet, found '\.json'"):
        convert_conversations(source, tmp_path / "out.json")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_reads_back_differently_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.json")
    monkeypatch.setattr(
        "slime.data.conversations.read_rows", lambda path: iter([(path, {"messages": KEPT[1]})])
    )
    with pytest.raises(DataError, match=r"in\.json\[0\] reads back differently"):
        convert_conversations(source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


# --- the array that is a file ---

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), _VALUES, max_size=3), max_size=4),
    chunk=st.integers(1, 30),
    indent=st.none() | st.integers(0, 2),
    is_ascii=st.booleans(),
)
def test_the_array_is_read_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    chunk: int,
    indent: int | None,
    is_ascii: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "array.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=is_ascii)
    path.write_bytes(text.encode("utf-8", "surrogatepass" if is_ascii else "replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_CHUNK_CHARS", chunk)
        expected = json.loads(path.read_text(encoding="utf-8"))
        assert [row for _, row in json_array(path)] == expected


def test_no_beginning_of_a_file_passes_for_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "array.json"
    text = json.dumps([{"a": [1, {"b": "}]"}]}, {}, {"c": 'x"y'}])
    for end in range(len(text)):
        path.write_text(text[:end])
        with pytest.raises(DataError, match="no whole JSON array"):
            list(json_array(path))


@pytest.mark.parametrize(
    "text",
    ['{"a": 1}', '{"a": 1}\n{"a": 2}\n', "[1]", "[{}] {}", "[{} {}]", "[{},]", "[{]", "\xff"],
)
def test_what_is_no_array_of_objects_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "array.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="array"):
        list(json_array(path))


def test_damage_does_not_make_it_read_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_CHUNK_CHARS", 100)
    monkeypatch.setattr(reader, "_MAX_CHARS", 1000)
    path = tmp_path / "array.json"
    path.write_text('[{"a": oops}, ' + '{"a": 1}, ' * 10_000 + "{}]")
    with pytest.raises(DataError, match="element 0 is damaged"):
        list(json_array(path))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    row = json.dumps({"conversations": [turn("human", "x" * 2000), turn("gpt", "y" * 2000)]})
    with path.open("w") as file:
        file.write("[" + ",\n".join([row] * 5000) + "]")  # 20 MB
    tracemalloc.start()
    try:
        done = convert_conversations(path, tmp_path / "out.jsonl")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert done.num_written == 5000
    assert peak < 10e6
