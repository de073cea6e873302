"""Verifiable instructions: id -> whether a text follows it; nothing is installed or fetched.

The ids and their arguments are those of published rows (`instruction_id_list`, `kwargs`); the checks
are written from the paper's descriptions, and stricter where its own could be satisfied by nothing.

Source: Zhou et al. 2023 (IFEval), arXiv:2311.07911, table 1.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[str, Mapping[str, Any]], bool]

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d)\]]*(?=\s|$)")
_ABBREVIATIONS = re.compile(r"\b(?:mr|mrs|ms|dr|prof|st|vs|etc|e\.g|i\.e)\.", re.IGNORECASE)
_BULLET = re.compile(r"^\s*(?:[*-])\s+\S", re.MULTILINE)
_HIGHLIGHT = re.compile(
    r"(?<!\*)\*(?![\s*])([^*\n]+?)(?<!\s)\*(?!\*)|\*\*(?![\s*])([^\n]+?)(?<![\s*])\*\*"
)
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def words(text: str) -> list[str]:
    """Words, in order; an apostrophe or hyphen inside does not cut one."""
    return _WORD.findall(text)


def num_sentences(text: str) -> int:
    """Sentences: what ends in . ! or ?, and a rest with words behind the last of these."""
    text = _ABBREVIATIONS.sub(lambda found: found[0].replace(".", ""), text)
    parts = [part for part in _SENTENCE_END.split(text) if words(part)]
    return len(parts)


def _compare(count: int, relation: Any, bound: Any) -> bool:
    if relation == "less than":
        return count < int(bound)
    if relation == "at least":
        return count >= int(bound)
    raise ValueError(f"unknown relation {relation!r}")


def _has(text: str, phrase: str) -> bool:
    return _occurrences(text, phrase) > 0


def _occurrences(text: str, phrase: str) -> int:
    pattern = rf"(?<!\w){re.escape(phrase)}(?!\w)"
    return len(re.findall(pattern, text, re.IGNORECASE))


def _frequency(text: str, given: Mapping[str, Any]) -> bool:
    return _compare(_occurrences(text, given["keyword"]), given["relation"], given["frequency"])


def _letters(text: str, given: Mapping[str, Any]) -> bool:
    count = text.lower().count(str(given["letter"]).lower())
    return _compare(count, given["let_relation"], given["let_frequency"])


def _paragraphs(text: str, divider: str) -> list[str]:
    return [part.strip() for part in re.split(divider, text) if part.strip()]


def _num_paragraphs(text: str, given: Mapping[str, Any]) -> bool:
    return len(_paragraphs(text, r"(?m)^\s*\*\*\*\s*$")) == given["num_paragraphs"]


def _nth_first_word(text: str, given: Mapping[str, Any]) -> bool:
    parts = _paragraphs(text, r"\n\s*\n")
    number = given["nth_paragraph"]
    if len(parts) != given["num_paragraphs"] or not 1 <= number <= len(parts):
        return False
    first = words(parts[number - 1])[:1]
    return bool(first) and first[0].lower() == str(given["first_word"]).lower()


def _postscript(text: str, given: Mapping[str, Any]) -> bool:
    marker = str(given["postscript_marker"])
    letters = [re.escape(letter) for letter in marker if letter.isalnum()]
    pattern = r"\.\s?".join(letters) if marker in ("P.S.", "P.P.S") else re.escape(marker)
    return bool(re.search(rf"^\s*{pattern}\W*\w", text, re.IGNORECASE | re.MULTILINE))


def _sections(text: str, given: Mapping[str, Any]) -> bool:
    splitter = re.escape(str(given["section_spliter"]).strip())
    parts = re.split(rf"(?m)^\W*{splitter}\s+(?:\d+|[IVX]+)\b[^\n]*$", text)
    return len([part for part in parts[1:] if words(part)]) >= given["num_sections"]


def _is_json(text: str, given: Mapping[str, Any]) -> bool:
    bare = re.sub(r"^```(?:json)?\s*\n(.*)\n\s*```$", r"\1", text.strip(), flags=re.S | re.I)
    try:
        value = json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return bool(value) and isinstance(value, dict | list)


def _two_responses(text: str, given: Mapping[str, Any]) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(map(words, parts)) and parts[0] != parts[1]


def _repeats(text: str, given: Mapping[str, Any]) -> bool:
    prompt = str(given["prompt_to_repeat"]).strip()
    start = text.strip()[: len(prompt)]
    return start.lower() == prompt.lower() and bool(words(text.strip()[len(prompt) :]))


def _ends(text: str, given: Mapping[str, Any]) -> bool:
    end = str(given["end_phrase"]).strip().lower()
    bare = text.strip().strip('"').strip().lower()
    return bare.endswith(end) and len(words(bare)) > len(words(end))


def _quoted(text: str, given: Mapping[str, Any]) -> bool:
    bare = text.strip()
    return len(bare) > 2 and bare[0] == bare[-1] == '"' and bool(words(bare))


def _title(text: str, given: Mapping[str, Any]) -> bool:
    return any(words(title) for title in re.findall(r"<<([^\n<>]+)>>", text))


def _capital_words(text: str, given: Mapping[str, Any]) -> bool:
    count = sum(word.isupper() for word in words(text))
    return _compare(count, given["capital_relation"], given["capital_frequency"])


def _highlights(text: str, given: Mapping[str, Any]) -> bool:
    found = {
        (one or two).strip() for one, two in _HIGHLIGHT.findall(text)
    }  # the same one counts once
    return len([part for part in found if words(part)]) >= given["num_highlights"]


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, given: all(_has(text, word) for word in given["keywords"]),
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": lambda text, given: (
        not any(_has(text, word) for word in given["forbidden_words"])
    ),
    "keywords:letter_frequency": _letters,
    "length_constraints:number_sentences": lambda text, given: _compare(
        num_sentences(text), given["relation"], given["num_sentences"]
    ),
    "length_constraints:number_words": lambda text, given: _compare(
        len(words(text)), given["relation"], given["num_words"]
    ),
    "length_constraints:number_paragraphs": _num_paragraphs,
    "length_constraints:nth_paragraph_first_word": _nth_first_word,
    "detectable_content:number_placeholders": lambda text, given: (
        len(set(re.findall(r"\[[^\[\]\n]+\]", text))) >= given["num_placeholders"]
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, given: (
        len(_BULLET.findall(text)) == given["num_bullets"]
    ),
    "detectable_format:constrained_response": lambda text, given: text.strip() in _CONSTRAINED,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text, given: text.isupper(),
    "change_case:english_lowercase": lambda text, given: text.islower(),
    "punctuation:no_comma": lambda text, given: not re.search("[,\uff0c\u060c]", text),
}
