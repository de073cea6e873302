import pytest

from slime.rollout.tool_calls import BadToolCall, ToolCall, parse_tool_calls


def test_parallel_calls_in_order():
    text = """<think>Two at once.</think>
<tool_call>
{"name": "add", "arguments": {"a": 2, "b": 3}}
</tool_call>
<tool_call>{"name": "now"}</tool_call> and more"""
    assert parse_tool_calls(text) == [ToolCall("add", {"a": 2, "b": 3}), ToolCall("now", {})]


def test_block_cut_by_its_stop_string_counts():
    assert parse_tool_calls('<tool_call>{"name": "now"}') == [ToolCall("now", {})]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("{name: add}", "no JSON"),
        ("[1]", 'no object with a "name"'),
        ('{"name": 3}', 'no object with a "name"'),
        ('{"name": "add", "arguments": [1]}', '"arguments" must be an object'),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_what_is_no_call_says_why(block: str, reason: str):
    (bad,) = parse_tool_calls(f"<tool_call>{block}</tool_call>")
    assert isinstance(bad, BadToolCall)
    assert bad.text == block
    assert reason in bad.reason


def test_text_without_calls_has_none():
    assert parse_tool_calls("the <tool> is { broken }") == []
