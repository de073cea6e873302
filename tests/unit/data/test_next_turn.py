from pathlib import Path
from typing import Any

import pytest
from support.chat_templates import DISTILL, QWEN3, QWEN3_5, REWRITING
from support.tiny_tokenizer import CHATML_TEMPLATE, make_char_tokenizer

from slime.data.chat import load_tokenizer
from slime.data.next_turn import text_until_next_answer
from slime.errors import DataError

TOOLS = [{"role": "tool", "content": "4"}, {"role": "tool", "content": "5"}]
# A family whose answers end with the token that opens the next turn (GLM-4).
OPENING = """\
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<|observation|>' + m.content }}
{%- else %}{{- '<|' + m.role + '|>' + m.content }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


def until_next(folder: Path, template: str, messages: list[Any], **kwargs: Any) -> str:
    tokenizer = load_tokenizer(make_char_tokenizer(folder, chat_template=template))
    return text_until_next_answer(tokenizer, messages, template_kwargs=kwargs)


def test_chatml(tmp_path: Path):
    text = until_next(tmp_path, CHATML_TEMPLATE, TOOLS[:1])
    assert text == "<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"


def test_neighbouring_tool_messages_share_a_block_where_the_template_says_so(tmp_path: Path):
    block = "<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response>"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    text = until_next(tmp_path / "3", QWEN3, TOOLS, enable_thinking=False)
    assert text == f"<|im_end|>\n<|im_start|>user\n{block}{end}<think>\n\n</think>\n\n"
    text = until_next(tmp_path / "3.5", QWEN3_5, TOOLS)
    assert text == f"<|im_end|>\n<|im_start|>user\n{block}{end}<think>\n"


def test_templates_without_an_end_token_of_their_own(tmp_path: Path):
    assert until_next(tmp_path, OPENING, TOOLS[:1]) == "<|observation|>4<|assistant|>"


def test_template_that_opens_the_thinking(tmp_path: Path):
    user = [{"role": "user", "content": "more"}]
    text = until_next(tmp_path, DISTILL, user)
    assert text == "<|im_end|><|User|>more<|Assistant|><think>\n"


def test_template_that_rewrites_what_was_before_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be continued message by message"):
        until_next(tmp_path, REWRITING, TOOLS)
