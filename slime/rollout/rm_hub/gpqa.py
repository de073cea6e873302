"""`--rm-type gpqa`: 1.0 if the response chooses the right letter of a multiple-choice question."""

import re
from typing import Any

from slime.data.sample import Sample
from slime.rollout.rm_hub.answers import answer_part, last_boxed
from slime.rollout.rm_hub.base import BadReward, label_of

_LETTERS = "ABCDEFGHIJ"
_MARKED = re.compile(
    r"(?:answer|choice|option)(?:\s+is|\s*[:=])+[ \t]*:?[ \t]*(\S[^\n]*)", re.IGNORECASE
)
_CHOICE = re.compile(
    r"^[\s*_$\\({\[\"']*(?:text\{)?(?:(?:option|choice|answer)\s+)?\(?([A-Ja-j])(?![A-Za-z0-9'])",
    re.IGNORECASE,
)
_ANOTHER = re.compile(r"^[)\]}*.\s]*(?:,|/|;|&|\bor\b|\band\b)[\s(\[*]*[A-J](?![A-Za-z0-9'])", re.I)
_ALONE = re.compile(r"^[\s*_$({\[\"']*([A-Ja-j])[\s*_$)}\].:\"']*$")


async def reward(args: Any, sample: Sample) -> float:
    r"""1.0 or 0.0.

    The label is the letter, the number of the choice counted from 0, or the text of one of
    `metadata["choices"]`. A response chooses in its last \boxed{}, else behind its last "answer is" or
    "Answer:", else with a last line that is a letter alone. One that names two letters there chooses
    none. Thinking never counts.

    Raises:
        BadReward: the label is no letter and none of the choices.
    """
    choices = [str(item).strip() for item in sample.metadata.get("choices") or ()]
    letter = _letter_of(label_of(args, sample), choices)
    return float(chosen_letter(sample.response, choices) == letter)


def chosen_letter(response: str, choices: list[str] | None = None) -> str | None:
    """The letter that a response commits to, as a capital; None if it does not."""
    text = answer_part(response)
    boxed = last_boxed(text)
    if boxed is not None:
        return _from_phrase(boxed, choices or [])
    marked = _MARKED.findall(text)
    if marked:
        return _from_phrase(marked[-1], choices or [])
    alone = _ALONE.match(text.rpartition("\n")[2])
    return alone[1].upper() if alone else None


def _from_phrase(phrase: str, choices: list[str]) -> str | None:
    plain = phrase.strip().strip("$*.").strip()
    if plain in choices:
        return _LETTERS[choices.index(plain)]
    found = _CHOICE.match(phrase)
    if not found:
        return None
    rest = phrase[found.end() :]
    # "A particle" begins with an article, not with a choice; a lower-case letter must stand alone.
    if not _ALONE.match(phrase):
        if found[1].islower() and not rest.startswith(")"):
            return None
        if found[1] in "AI" and re.match(r"\s+[a-z]", rest):
            return None
    return None if _ANOTHER.match(rest) else found[1].upper()


def _letter_of(label: Any, choices: list[str]) -> str:
    text = str(label).strip()
    if text in choices:
        return _LETTERS[choices.index(text)]
    bare = text.strip("().").upper()
    if len(bare) == 1 and bare in _LETTERS:
        return bare
    if text.isdecimal() and int(text) < len(_LETTERS):
        return _LETTERS[int(text)]
    raise BadReward(
        "bad_label", f"gpqa wants a letter or one of metadata['choices'], found {label!r:.80}"
    )
