from types import SimpleNamespace
from typing import Any

import pytest

from slime.data.sample import Sample
from slime.rollout.rm_hub import ifeval
from slime.rollout.rm_hub.base import BadReward
from slime.rollout.rm_hub.instructions import CHECKS, num_sentences

ARGS = SimpleNamespace(label_key=None)

# id, arguments, a text that follows, texts that do not.
CASES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    (
        "keywords:existence",
        {"keywords": ["rain", "sun"]},
        "Rain, then SUN.",
        ["rain", "rainy sunny"],
    ),
    (
        "keywords:frequency",
        {"keyword": "rain", "frequency": 2, "relation": "at least"},
        "rain rain",
        ["rain", "rain rainrain"],
    ),
    (
        "keywords:frequency",
        {"keyword": "rain", "frequency": 2, "relation": "less than"},
        "rain",
        ["Rain rain"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["so"]}, "sofa", ["So it is"]),
    (
        "keywords:letter_frequency",
        {"letter": "z", "let_frequency": 2, "let_relation": "at least"},
        "Zz",
        ["z"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "Dr. Who came. He left!",
        ["Dr. Who came.", "One ... . . ."],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "it's well-known",
        ["one two three"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        "a b c",
        ["- - - a"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "a\n***\nb",
        ["a", "a\n***\n\n***\n"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        "First.\n\nthen more",
        ["Then", "First.\n\nmore", "a\n\nthen b\n\nc"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "Dear [name], [date]",
        ["Dear [name]", "[name] [name]", "[] []"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "Bye.\nP.S. Write!",
        ["Bye.", "Bye.\nP.S.", "ps inside"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "* a\n- b",
        ["* a", "* a\n* b\n* c"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        "My answer is yes.",
        ["yes", "My answer is yes. My answer is no."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*one* and **two**",
        ["*one*", "*a* *a*", "** **", "2 * 3 * 4"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\nWords.\nSECTION 2\nMore.",
        ["SECTION 1\nWords.", "SECTION 1\nSECTION 2\n"],
    ),
    (
        "detectable_format:json_format",
        {},
        '```json\n{"a": 1}\n```',
        ["{a: 1}", "{}", "7", "[" * 10000],
    ),
    ("detectable_format:title", {}, "<<A day>>\ntext", ["<<>>", "<< >> a"]),
    ("combination:two_responses", {}, "one\n******\ntwo", ["one", "a ****** a", "a ****** "]),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Why?"},
        "Why? Because.",
        ["Because. Why?", "Why?"],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "The end."},
        "So it was. The end.",
        ["The end. x", "The end."],
    ),
    ("startend:quotation", {}, '"words"', ["words", '""', '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NOW GO",
        ["NOW go"],
    ),
    ("change_case:english_capital", {}, "LOUD 1", ["Loud", "11"]),
    ("change_case:english_lowercase", {}, "quiet 1", ["Quiet", "11"]),
    ("punctuation:no_comma", {}, "a and b", ["a, b", "a\uff0cb"]),
]


def row(response: str, names: list[str], kwargs: list[dict[str, Any]] | None) -> Sample:
    metadata: dict[str, Any] = {"instruction_id_list": names, "kwargs": kwargs}
    return Sample(response=response, metadata=metadata)


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), CASES, ids=[case[0] for case in CASES])
async def test_an_instruction(name: str, kwargs: dict[str, Any], good: str, bad: list[str]) -> None:
    assert await ifeval.reward(ARGS, row(good, [name], [kwargs])) == 1.0
    for text in bad:
        assert await ifeval.reward(ARGS, row(text, [name], [kwargs])) == 0.0, text


def test_every_instruction_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(CHECKS)


@pytest.mark.parametrize("response", ["", "...", "<think>good thoughts", "<|im_end|>", "\n"])
async def test_saying_nothing_follows_nothing(response: str) -> None:
    """Forbidden words, commas and lengths could else be avoided by silence."""
    names = ["punctuation:no_comma", "keywords:forbidden_words", "length_constraints:number_words"]
    kwargs: list[dict[str, Any]] = [
        {},
        {"forbidden_words": ["a"]},
        {"num_words": 9, "relation": "less than"},
    ]
    assert await ifeval.reward(ARGS, row(response, names, kwargs)) == 0.0
    assert await ifeval.reward(ARGS, row("<think>a, b</think>Fine!", names, kwargs)) == 1.0


async def test_all_have_to_be_followed() -> None:
    names = ["punctuation:no_comma", "change_case:english_capital"]
    assert await ifeval.reward(ARGS, row("YES", names, None)) == 1.0
    assert await ifeval.reward(ARGS, row("YES, SIR", names, None)) == 0.0


async def test_what_nobody_can_check_is_refused_by_name() -> None:
    names = ["punctuation:no_comma", "language:response_language"]
    with pytest.raises(BadReward, match="no check for language:response_language"):
        await ifeval.reward(ARGS, row("a", names, None))
    with pytest.raises(BadReward, match="no instruction_id_list"):
        await ifeval.reward(ARGS, Sample(response="a"))
    with pytest.raises(BadReward, match="2 instructions, but 1 kwargs"):
        await ifeval.reward(ARGS, row("a", ["punctuation:no_comma"] * 2, [{}]))
    with pytest.raises(BadReward, match="do not fit"):
        await ifeval.reward(ARGS, row("a", ["keywords:existence"], [{}]))


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("One", 1), ("One. Two? Three!", 3), ("At 3.5 m/s. Yes", 2), ("e.g. this.", 1)],
)
def test_sentences(text: str, count: int) -> None:
    assert num_sentences(text) == count
