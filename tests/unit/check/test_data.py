from pathlib import Path
from typing import Any

import pytest
from support.tiny_tokenizer import make_char_tokenizer

from slime.check import data, rows
from slime.check.data import DataFacts, check_data, count_rows
from slime.config.config import Config
from slime.config.problems import Problems


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = make_char_tokenizer(tmp_path / "model")
    (Path(folder) / "config.json").write_text('{"max_position_embeddings": 100}')
    return folder


def judged(model: str, path: str, **changes: Any) -> tuple[list[DataFacts], list[str]]:
    problems = Problems()
    found = check_data(Config(hf_checkpoint=model, prompt_data=path, **changes), problems)
    return found, problems.messages


def write_rows(path: Path, count: int, text: str = "abc") -> str:
    path.write_text("".join(f'{{"input": "{text}"}}\n' for _ in range(count)))
    return str(path)


def write_parquet(path: Path, count: int) -> str:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"input": ["abcd"] * count}), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("part", "expected"), [("", 10), ("@[2:5]", 3), ("@[-4:]", 4)])
def test_rows_of_a_slice_are_counted(
    model: str, tmp_path: Path, suffix: str, part: str, expected: int
) -> None:
    write = write_parquet if suffix == ".parquet" else write_rows
    found, problems = judged(model, write(tmp_path / f"a{suffix}", 10) + part)
    assert problems == []
    assert (found[0].num_rows, found[0].num_checked, found[0].is_exact) == (
        expected,
        expected,
        True,
    )
    assert found[0].longest == (4 if suffix == ".parquet" else 3)


def test_a_large_file_is_judged_by_its_beginning(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MAX_COUNTED_BYTES", 100)
    monkeypatch.setattr(data, "MAX_ROWS", 20)
    monkeypatch.setattr(rows, "MAX_TEMPLATED", 7)
    found, problems = judged(model, write_rows(tmp_path / "a.jsonl", 50))
    assert problems == []
    facts = found[0]
    assert (facts.num_rows, facts.is_exact) == (50, False)
    assert (facts.num_checked, facts.num_templated) == (20, 7)


def test_files_of_another_kind_are_named(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("input\n")
    assert "must be .jsonl or .parquet" in judged(model, str(tmp_path / "a.csv"))[1][0]
    (tmp_path / "a.parquet").write_text("no parquet at all")
    assert "not a parquet file" in judged(model, str(tmp_path / "a.parquet"))[1][0]


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input": "a"}\n\n  \n{"input": "b"}\n')
    assert count_rows(tmp_path / "a.jsonl") == (2, True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"input": "a", "metadata": 3}', "metadata must be an object, found 3"),
        ('{"input": "a", "metadata": "{"}', "expected JSON"),
        ('{"input": "a", "tools": "["}', "expected JSON"),
        ('{"input": 7}', "the prompt must be a string or a list of messages"),
        ('{"input": "a"', "not JSON"),
    ],
)
def test_each_kind_of_mistake_is_told_with_its_row(
    model: str, tmp_path: Path, row: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"input": "good"}}\n{row}\n')
    _, problems = judged(model, str(path))
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}:2: ")
    assert message in problems[0]


def test_a_file_of_garbage_is_not_told_line_by_line(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("garbage\n" * 100)
    assert len(judged(model, str(tmp_path / "a.jsonl"))[1]) == data.MAX_BROKEN_ROWS


def test_a_template_gets_tools_and_variables(model: str, tmp_path: Path) -> None:
    template = "{{ tools[0].name }}{{ enable_thinking }}{{ raise_exception('seen') }}"
    (Path(model) / "chat_template.jinja").write_text(template)
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "a", "tools": [{"name": "add", "null": null}]}\n')
    _, problems = judged(model, str(path), apply_chat_template=True)
    assert "TemplateError: seen" in problems[0]


def test_a_tokenizer_that_cannot_be_read_here_is_a_note(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (Path(model) / "tokenizer.json").rename(Path(model) / "tokenizer.model")
    found, problems = judged(model, write_rows(tmp_path / "a.jsonl", 2))
    assert (problems, found[0].longest) == ([], None)
    assert "has no tokenizer.json: the tokens of prompts are not counted" in caplog.text


def test_a_damaged_tokenizer_is_a_problem(model: str, tmp_path: Path) -> None:
    (Path(model) / "tokenizer.json").write_text("{")
    _, problems = judged(model, write_rows(tmp_path / "a.jsonl", 2))
    assert len(problems) == 1
    assert "cannot read" in problems[0]
