"""Text of answers and stop strings, also across tokens that are parts of a character."""

from collections.abc import Sequence

import pytest
from support.tiny_models import char_tokenizer

from slime.engines.embedded.detokenize import Detokenizer, StopStrings
from slime.engines.protocol import SamplingParams, finish_length, finish_stop


@pytest.fixture(scope="module")
def detokenizer() -> Detokenizer:
    return Detokenizer(char_tokenizer())


class FakeByteDetokenizer(Detokenizer):
    """Every token is one byte of UTF-8, the hardest case for incremental decoding."""

    def __init__(self) -> None:
        pass

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, spaces_between: bool = True
    ) -> str:
        return bytes(ids).decode(errors="replace")


def matched(stops: tuple[str, ...], ids: list[int], detokenizer: Detokenizer) -> tuple[int, str]:
    """Number of tokens read until a stop string, and which one it was."""
    search = StopStrings(detokenizer, stops)
    for count, token in enumerate(ids, 1):
        found = search.push(token)
        if found is not None:
            return count, found
    return len(ids), ""


def test_encode_and_decode_are_inverse(detokenizer: Detokenizer) -> None:
    ids = detokenizer.encode("hello, you!")
    assert detokenizer.decode(ids, skip_special_tokens=True) == "hello, you!"


def test_a_stop_string_is_found_when_its_last_token_arrives(detokenizer: Detokenizer) -> None:
    ids = detokenizer.encode("abcabd and more")
    assert matched(("abd",), ids, detokenizer) == (6, "abd")


def test_the_earliest_stop_string_counts(detokenizer: Detokenizer) -> None:
    ids = detokenizer.encode("xyz")
    assert matched(("yz", "xyz"), ids, detokenizer) == (3, "xyz")


def test_a_special_token_can_be_a_stop_string(detokenizer: Detokenizer) -> None:
    assert matched(("<eos>",), [*detokenizer.encode("ab"), 1, 5], detokenizer) == (3, "<eos>")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [("aéb", "é", 3), ("日本語です", "語", 9), ("ab😀cd", "😀c", 7), ("日", "本", 3)],
)
def test_characters_of_several_tokens_are_awaited(text: str, stop: str, expected: int) -> None:
    detokenizer = FakeByteDetokenizer()
    count, found = matched((stop,), list(text.encode()), detokenizer)
    assert count == expected
    assert found == (stop if stop in text else "")


def test_incremental_text_is_that_of_all_tokens_at_once() -> None:
    text = "naïve 日本語 text with 😀 and é" * 3
    search = StopStrings(FakeByteDetokenizer(), ("never",))
    for byte in text.encode():
        search.push(byte)
    assert search._text == text


def test_what_ended_the_answer_is_cut_from_its_text(detokenizer: Detokenizer) -> None:
    ids = [*detokenizer.encode("hello"), 1]
    keep = SamplingParams(skip_special_tokens=False)
    text = detokenizer.answer_text
    assert text(ids, keep, finish_stop(1)) == "hello"
    assert text(
        ids, SamplingParams(skip_special_tokens=False, no_stop_trim=True), finish_stop(1)
    ) == ("hello<eos>")
    assert text(ids, keep, finish_length(6)) == "hello<eos>"
    assert text(ids, SamplingParams(), finish_length(6)) == "hello"
    assert text(ids, keep, finish_stop("lo")) == "hel"
    assert text(ids, keep, None) == "hello<eos>"
