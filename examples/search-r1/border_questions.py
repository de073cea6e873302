"""Questions whose answers the World Factbook has, with labels that two places of it agree on.

    python border_questions.py FOLDER      writes train.jsonl and held_out.jsonl, and prints what was dropped and why

Kinds: `capital` (What is the capital of X?), `neighbour` (With which country does X share its longest land border?)
and `two-hop` (What is the capital of the country with which X shares its longest land border?).
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from borders import Borders, NoFact
from factbook import Country, countries, data_folder, passages
from search_index import SearchIndex
from search_r1 import QUESTION, SEPARATOR, normalised, stands_in

HELD_OUT_SHARE = 0.2
QUESTIONS = {
    "capital": "What is the capital of {}?",
    "neighbour": "With which country does {} share its longest land border?",
    "two-hop": "What is the capital of the country with which {} shares its longest land border?",
}
INSTRUCTION = (
    "Answer the question. You can search the CIA World Factbook: write <search>a query</search> and stop; what is "
    "found comes back between <information> and </information>. Search as often as you need, one query at a time, "
    "and think before and after. When you know it, end with the answer alone between <answer> and </answer>, for "
    "example <answer>Atlantis</answer>. "
)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        answers: what is right, the usual spelling first.
        about: codes of all countries it is about: the one asked for and those of the way to the answer.
    """

    kind: str
    text: str
    answers: tuple[str, ...]
    about: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """The row of a data file."""
        return {
            "prompt": [{"role": "user", "content": INSTRUCTION + QUESTION + self.text}],
            "label": SEPARATOR.join(self.answers),
            "metadata": {"kind": self.kind, "about": list(self.about)},
        }


def capital(country: Country) -> tuple[str, ...]:
    """The capital and its other spellings.

    Raises:
        NoFact: there is none, there are several, or the list of cities does not mark the same one.
    """
    told = country.text("Government", "Capital", "name").split("; note")[0].strip()
    if not told:
        raise NoFact("no capital")
    if re.search(r";|\bcapital\b|\bseat\b|administ| in ", told):
        raise NoFact("several capitals, or one with conditions")
    name, _, rest = told.partition(" (")
    others = rest.rstrip(")").split(" is the ")[0]
    cities = country.text("People and Society", "Major urban areas - population")
    # "9.292 million LUANDA (capital), 959,000 Lubango": what stands between a number and the mark.
    marked = re.findall(r"\d(?: million)? ([^\d]+?)\s*\(capital\)", cities)
    if not marked:
        raise NoFact("the list of cities marks no capital")
    answers = (name, *filter(str.istitle, re.split(r",\s*", others)))
    if len(marked) > 1 or normalised(marked[0]) not in map(normalised, answers):
        raise NoFact("the list of cities marks another capital")
    return answers


def make_questions(known: Mapping[str, Country]) -> tuple[list[Question], Counter[tuple[str, str]]]:
    """All questions whose labels are certain, and (kind, reason) -> how many are not."""
    borders, dropped = Borders(known.values()), Counter[tuple[str, str]]()
    made: list[Question] = []
    for country in known.values():
        for kind, text in QUESTIONS.items():
            try:
                about, answers = _facts(kind, country, known, borders)
                question = Question(kind, text.format(country.name), answers, about)
                _must_not_answer_itself(question)
            except NoFact as no:
                dropped[kind, no.reason] += 1
            else:
                made.append(question)
    return made, dropped


def split(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Train and held-out; no country that a question of one side is about occurs on the other.

    Countries of one question go together, and so do those of the next that has one of them. A hash decides for each
    such family.
    """
    family: dict[str, str] = {}

    def head(code: str) -> str:
        while (parent := family.setdefault(code, code)) != code:
            code = parent
        return code

    for question in questions:
        first, *others = map(head, question.about)
        for other in others:
            family[head(other)] = head(first)
    sides: tuple[list[Question], list[Question]] = [], []
    members: dict[str, list[str]] = {}
    for code in sorted(family):
        members.setdefault(head(code), []).append(code)
    held_out = {key for key, codes in members.items() if _is_held_out(codes[0])}
    for question in questions:
        sides[head(question.about[0]) in held_out].append(question)
    return sides


def passages_found(known: Iterable[Country], topk: int = 3) -> dict[str, tuple[int, int]]:
    """Field -> (for how many countries a plain query finds it among the first `topk`, how many have it)."""
    pages = list(known)
    index = SearchIndex(passages(pages))
    found: dict[str, tuple[int, int]] = {}
    for field, section, part in (
        ("Capital", "Government", "name"),
        ("Land boundaries", "Geography", "border countries"),
    ):
        having = [country for country in pages if country.text(section, field, part)]
        hits = [
            f"{country.code}/{section}/{field}"
            in (hit.passage.id for hit in index.search(f"{field} of {country.name}", topk))
            for country in having
        ]
        found[field] = sum(hits), len(having)
    return found


def _facts(
    kind: str, country: Country, known: Mapping[str, Country], borders: Borders
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(codes, answers) of one question."""
    if kind == "capital":
        return (country.code,), capital(country)
    neighbour = known[borders.longest(country)]
    answers = neighbour.names if kind == "neighbour" else capital(neighbour)
    return (country.code, neighbour.code), answers


def _must_not_answer_itself(question: Question) -> None:
    if any(stands_in(normalised(answer), question.text) for answer in question.answers):
        raise NoFact("the answer stands in the question")


def _is_held_out(code: str) -> bool:
    return hashlib.sha256(code.encode()).digest()[0] < HELD_OUT_SHARE * 256


def _write(path: Path, questions: Iterable[Question]) -> None:
    path.write_text("".join(json.dumps(question.row()) + "\n" for question in questions))


def main() -> None:
    """Write the data and say what is in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    known = countries(data_folder())
    questions, dropped = make_questions(known)
    train, held_out = split(questions)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.jsonl", train)
    _write(folder / "held_out.jsonl", held_out)
    for kind in QUESTIONS:
        sizes = [sum(q.kind == kind for q in side) for side in (train, held_out)]
        print(f"{kind}: {sizes[0]} to train on, {sizes[1]} held out; dropped:")  # noqa: T201
        for (of_kind, reason), number in dropped.most_common():
            if of_kind == kind:
                print(f"  {number:4d}  {reason}")  # noqa: T201
    for field, (found, having) in passages_found(known.values()).items():
        asked = f"{field.lower()} of X"
        print(f"{asked!r} finds the passage among the first 3 for {found} of {having}")  # noqa: T201


if __name__ == "__main__":
    main()
