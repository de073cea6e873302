"""FolderTokenizer says what transformers says, byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from support import chat_templates
from support.tiny_tokenizer import CHATML_TEMPLATE, make_char_tokenizer

from slime.data.chat import load_tokenizer, render
from slime.data.templates import FolderTokenizer, has_tokenizer
from slime.errors import CheckpointError

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "add", "description": "a < b & 'c' é"}}
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "1 + 1 = <b>é</b>?\n"}],
    [
        {"role": "system", "content": "  be brief  "},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\ny"},
        {"role": "tool", "content": "7"},
        {"role": "tool", "content": "8"},
        {"role": "user", "content": "b"},
    ],
]
# What only the environment decides: trimming of blocks, break, JSON without HTML escapes, marks.
ENVIRONMENT = """\
{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ nothing_here }}
  {% for m in messages %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% generation %}[{{ m | tojson }}]{% endgeneration %}

  {% endfor %}
{{ tools | tojson(indent=2) }} {{ strftime_now('%Y') }}{% if add_generation_prompt %}GO{% endif %}
"""
TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    "qwen3": chat_templates.QWEN3,
    "qwen3.5": chat_templates.QWEN3_5,
    "distill": chat_templates.DISTILL,
    "rewriting": chat_templates.REWRITING,
    "environment": ENVIRONMENT,
}


def texts(tokenizer: Any) -> list[str]:
    return [
        tokenizer.apply_chat_template(
            chat, tools=tools, add_generation_prompt=begins, tokenize=False, **variables
        )
        for chat in CHATS
        for tools in (None, TOOLS)
        for begins in (True, False)
        for variables in ({}, {"enable_thinking": False}, {"eos_token": "X"})
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    folder = make_char_tokenizer(tmp_path, chat_template=TEMPLATES[name])
    ours, theirs = FolderTokenizer(folder), load_tokenizer(folder)
    found = texts(ours)
    assert found == texts(theirs)
    assert [ours.ids(text) for text in found] == [
        theirs(text, add_special_tokens=False)["input_ids"] for text in found
    ]
    assert len(set(found)) >= 4  # the cases differ from each other


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("where", ["list", "string", "folder"])
def test_wherever_the_template_stands(tmp_path: Path, where: str) -> None:
    make_char_tokenizer(tmp_path)
    own = tmp_path / "chat_template.jinja"
    if where == "list":
        own.unlink()
        rows = [
            {"name": "default", "template": "plain{{ eos_token }}"},
            {"name": "tool_use", "template": "tools"},
        ]
        edit(tmp_path, chat_template=rows)
    elif where == "string":
        own.unlink()
        edit(tmp_path, chat_template="one{{ bos_token }}")
    else:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools in a file")
    load_tokenizer.cache_clear()
    assert texts(FolderTokenizer(tmp_path)) == texts(load_tokenizer(str(tmp_path)))


def test_special_tokens_with_settings(tmp_path: Path) -> None:
    make_char_tokenizer(tmp_path, chat_template="{{ bos_token }}{{ eos_token }}")
    token = {"content": "<|im_start|>", "lstrip": False, "rstrip": False, "normalized": False}
    edit(tmp_path, bos_token=token | {"single_word": False, "__type": "AddedToken"})
    load_tokenizer.cache_clear()
    expected = load_tokenizer(str(tmp_path)).apply_chat_template(CHATS[0], tokenize=False)
    assert FolderTokenizer(tmp_path).apply_chat_template(CHATS[0]) == expected
    assert expected == "<|im_start|><|im_end|>"


def test_a_template_may_refuse_the_messages(tmp_path: Path) -> None:
    make_char_tokenizer(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateError, match="roles must alternate"):
        FolderTokenizer(tmp_path).apply_chat_template(CHATS[0])


def test_it_fits_where_a_tokenizer_renders(tmp_path: Path) -> None:
    tokenizer: Any = FolderTokenizer(make_char_tokenizer(tmp_path))
    assert "1 + 1" in render(tokenizer, CHATS[0], where="here")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    empty = FolderTokenizer(tmp_path)
    assert not empty.has_template
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json"):
        empty.ids("a")
    with pytest.raises(ValueError, match="no default chat template"):
        empty.apply_chat_template(CHATS[0])
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        FolderTokenizer(tmp_path)
