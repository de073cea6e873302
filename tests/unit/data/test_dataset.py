import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_tokenizer import make_char_tokenizer

from slime.data.chat import Tokenizer, load_tokenizer
from slime.data.dataset import Dataset, DatasetSpec, read_rows, split_slice
from slime.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_char_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The rows 0..9 in both formats."""
    folder, rows = tmp_path_factory.mktemp("numbered"), [{"input": str(i)} for i in range(10)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "rows.parquet", row_group_size=3)
    return {
        "jsonl": write_jsonl(folder / "rows.jsonl", rows),
        "parquet": str(folder / "rows.parquet"),
    }


bounds = st.none() | st.integers(-12, 12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(start=bounds, stop=bounds, suffix=st.sampled_from(["jsonl", "parquet"]))
def test_a_slice_takes_the_rows_python_would(
    numbered: dict[str, str], start: int | None, stop: int | None, suffix: str
) -> None:
    words = ["" if bound is None else str(bound) for bound in (start, stop)]
    rows = read_rows(f"{numbered[suffix]}@[{':'.join(words)}]")
    assert [row["input"] for _, row in rows] == [str(i) for i in range(10)][start:stop]


def test_a_path_without_slice_may_hold_an_at_sign() -> None:
    assert split_slice("a@b/c.jsonl") == (Path("a@b/c.jsonl"), slice(None))
    assert split_slice("a@b/c.jsonl@[:5]") == (Path("a@b/c.jsonl"), slice(None, 5))


def test_a_malformed_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"input": "a"}\n\n{"input": \n')
    with pytest.raises(DataError, match=r"p\.jsonl:3: not JSON"):
        Dataset(DatasetSpec(path=str(path)), None)


def test_a_malformed_line_outside_the_slice_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"input": "a"}\nnonsense\n')
    assert len(Dataset(DatasetSpec(path=f"{path}@[:1]"), None)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1, 2]", "a row must be a JSON object"),
        (b'{"input": "\xff"}', "not JSON"),
        (b'{"prompt": "a"}', r"no key 'input'; the row has \['prompt'\]"),
        (b'{"input": 5}', "must be a string or a list of messages"),
        (b'{"input": "a", "metadata": "x"}', "expected JSON"),
        (b'{"input": "a", "metadata": [1]}', "metadata must be an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(DataError, match=rf"p\.jsonl:1: .*{message}"):
        Dataset(DatasetSpec(path=str(path)), None)


def test_a_missing_label_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"input": "a"}])
    with pytest.raises(DataError, match="no key 'answer'"):
        Dataset(DatasetSpec(path=path, label_key="answer"), None)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("a")
    (tmp_path / "p.parquet").write_text("a")
    (tmp_path / "p.jsonl").write_text("\n")
    for name, message in {
        "none.jsonl": "no such file",
        "p.csv": "must be .jsonl or .parquet",
        "p.parquet": "not a parquet file",
        "p.jsonl": "no prompts left of 0 rows",
    }.items():
        with pytest.raises(DataError, match=message):
            Dataset(DatasetSpec(path=str(tmp_path / name)), None)


def test_multimodal_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="--multimodal-keys"):
        Dataset(DatasetSpec(path="p.jsonl", multimodal_keys={"image": "i"}), None)


def test_rows_become_templated_and_tokenised_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tool = {"name": "f"}
    path = write_jsonl(
        tmp_path / "p.jsonl",
        [{"q": "1+1?", "a": 2, "metadata": {"rm_type": "math"}, "tools": [tool]}],
    )
    spec = DatasetSpec(
        path=path,
        input_key="q",
        label_key="a",
        apply_chat_template=True,
        apply_chat_template_kwargs={"enable_thinking": False},
        metadata={"source_name": "sums"},
    )
    sample = Dataset(spec, tokenizer).sample(0)
    assert sample.prompt == (
        '<|im_start|>system\n# Tools\n{"name": "f"}\n<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n'
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert tokenizer.decode(sample.tokens) == sample.prompt
    assert sample.response_length == 0
    assert sample.label == 2
    assert sample.metadata == {"rm_type": "math", "source_name": "sums", "tools": [tool]}
    assert sample.apply_chat_template_kwargs == {"enable_thinking": False}


def test_messages_stay_messages_without_a_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_jsonl(tmp_path / "p.jsonl", [{"input": messages}, {"input": "text"}])
    dataset = Dataset(DatasetSpec(path=path, max_prompt_len=4), tokenizer)
    assert dataset.sample(0).prompt == messages
    assert dataset.sample(0).tokens == []
    assert len(dataset.sample(1).tokens) == 4


def test_nested_parquet_columns_lose_their_nulls(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"input": [{"role": "user", "content": "a", "name": None}], "metadata": '{"k": 1}'},
        {"input": [{"role": "user", "content": "b", "name": "n"}], "metadata": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    dataset = Dataset(DatasetSpec(path=str(tmp_path / "p.parquet")), tokenizer)
    assert dataset.sample(0).prompt == [{"role": "user", "content": "a"}]
    assert dataset.sample(0).metadata == {"k": 1}
    assert dataset.sample(1).metadata == {}


def test_long_prompts_are_dropped_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"input": "x" * n} for n in (3, 6, 5, 9)])
    with caplog.at_level(logging.WARNING):
        dataset = Dataset(DatasetSpec(path=path, max_prompt_len=5), tokenizer)
    assert [len(dataset.sample(i).tokens) for i in range(len(dataset))] == [3, 5]
    assert dataset.num_dropped == 2
    assert "dropped 2 of 4 prompts longer than 5 tokens" in caplog.text
    with pytest.raises(DataError, match="all are longer than 2 tokens"):
        Dataset(DatasetSpec(path=path, max_prompt_len=2), tokenizer)


def test_each_text_is_tokenised_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts: list[str] = []

    class CountingTokenizer:
        def __call__(self, text: list[str], **kwargs: Any) -> Any:
            texts.extend(text)
            return tokenizer(text, **kwargs)

    path = write_jsonl(tmp_path / "p.jsonl", [{"input": f"{i}"} for i in range(5)])
    counting: Any = CountingTokenizer()
    dataset = Dataset(DatasetSpec(path=path, max_prompt_len=5), counting)
    assert [dataset.sample(i).tokens for i in range(5)]
    assert texts == ["0", "1", "2", "3", "4"]


def test_samples_share_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"input": "a", "metadata": {"list": []}}])
    dataset = Dataset(DatasetSpec(path=path), None)
    dataset.sample(0).metadata["list"].append(1)
    assert dataset.sample(0).metadata == {"list": []}


def test_epoch_order_is_a_permutation_fixed_by_seed_and_epoch(numbered: dict[str, str]) -> None:
    dataset = Dataset(DatasetSpec(path=numbered["jsonl"]), None)
    first = dataset.epoch_order(42, 0)
    assert sorted(first) == list(range(10))
    assert first == [7, 3, 2, 8, 5, 6, 9, 4, 0, 1]  # a change here would break every resume
    assert dataset.epoch_order(42, 1) == dataset.epoch_order(43, 0) != first


def test_a_parquet_file_is_read_group_by_group(tmp_path: Path) -> None:
    rows = [{"text": f"{number:06}" * 300} for number in range(5000)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=250, use_dictionary=False)
    size, before = table.nbytes, pa.total_allocated_bytes()
    kept = max(pa.total_allocated_bytes() for _ in read_rows(str(tmp_path / "p.parquet")))
    assert kept - before < size / 4
