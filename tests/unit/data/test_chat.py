from pathlib import Path

import pytest
from support.tiny_tokenizer import make_char_tokenizer

from slime.data.chat import Tokenizer, as_messages, load_tokenizer, render, token_ids
from slime.errors import CheckpointError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_char_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_the_tiny_tokenizer_round_trips_its_characters(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nA b~!<|im_end|>\n<think>x</think>"
    ids = token_ids(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.eos_token_id or 0) == 1


def test_render_opens_the_answer_and_hands_variables_to_the_template(tokenizer: Tokenizer) -> None:
    messages = as_messages("hi", where="row")
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, messages, where="row") == text
    quiet = render(tokenizer, messages, where="row", template_kwargs={"enable_thinking": False})
    assert quiet == text + "<think>\n\n</think>\n\n"


def test_a_template_that_refuses_names_the_row(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:7: the chat template failed"):
        render(tokenizer, [{"role": "user", "content": 5}], where="a.jsonl:7")


def test_a_tokenizer_without_template_names_the_row(tmp_path: Path) -> None:
    path = make_char_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="row 1"):
        render(load_tokenizer(path), [{"role": "user", "content": "x"}], where="row 1")


def test_a_missing_tokenizer_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--hf-checkpoint"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="--hf-checkpoint"):
        load_tokenizer(None)


def test_null_keys_of_parquet_messages_are_dropped() -> None:
    value = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "id": None}]},
    ]
    assert as_messages(value, where="row") == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},
    ]


@pytest.mark.parametrize("value", [None, 3, [], ["hi"], [{"content": "x"}], [{"role": "user"}]])
def test_what_is_no_prompt_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="row 3"):
        as_messages(value, where="row 3")
