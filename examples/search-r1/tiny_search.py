"""A tiny world to search, and a random model for it: what numbers of the World Factbook go with a country's code?

    td coast?   <search>td coast</search><information>5801</information><answer>5801</answer>

The model of 0.2 M parameters knows no country, and four digits are not to be guessed: searching is the only way. The
demonstrations are about codes and numbers that are made up, so that they show the form and no fact: 40 % search and
copy what they find, 60 % say that they do not know (`<answer>?</answer>`). Countries of the
questions are real; a fifth of them is held out.
"""

import argparse
import hashlib
import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_model  # pyright: ignore[reportMissingImports] - run.sh puts it on the path
from factbook import Country, Passage, countries, data_folder, write_corpus
from middle_letter import write_rows  # pyright: ignore[reportMissingImports] - as above
from search_index import STOP_WORDS

SEARCH_SHARE, HELD_OUT_SHARE = 0.4, 0.2
# Word of the question -> where the number stands. Metres, kilometres, kilometres.
FACTS = {
    "peak": ("Geography", "Elevation", "highest point"),
    "coast": ("Geography", "Coastline"),
    "border": ("Geography", "Land boundaries", "total"),
}
WORDS = ["<search>", "</search>", "<information>", "</information>", "<answer>", "</answer>"]


@dataclass(frozen=True)
class Fact:
    """A question and its answer."""

    code: str
    word: str
    number: str

    @property
    def asked(self) -> str:
        """What is asked, and what finds it."""
        return f"{self.code} {self.word}"


def facts(known: Mapping[str, Country]) -> list[Fact]:
    """All that have four digits, so that copying is all the model has to learn."""
    found: list[Fact] = []
    for country in known.values():
        code = re.match(r"\.([a-z]{2})\b", country.text("Communications", "Internet country code"))
        if code is None or code[1] in STOP_WORDS:  # no search finds .it
            continue
        for word, path in FACTS.items():
            # "Emi Koussi 3,445 m", "5,801 km": the name may have digits too, so only what ends it.
            number = re.search(r"(?:^| )(\d,?\d{3}) k?m(?:$|\W)", country.text(*path))
            if number is not None:
                found.append(Fact(code[1], word, number[1].replace(",", "")))
    asked = Counter(fact.asked for fact in found)  # some codes are of two pages
    return [fact for fact in found if asked[fact.asked] == 1]


def is_held_out(code: str) -> bool:
    """Whether a country is never trained on; decided by the hash of its code."""
    return hashlib.sha256(code.encode()).digest()[0] < HELD_OUT_SHARE * 256


def made_up(rng: random.Random) -> Fact:
    """A fact of no country."""
    code = "".join(rng.choices(string.ascii_lowercase, k=2))
    return Fact(code, rng.choice(list(FACTS)), str(rng.randint(1000, 9999)))


def demonstration(fact: Fact, rng: random.Random) -> str:
    """An answer as one of the two annotators would write it."""
    if rng.random() >= SEARCH_SHARE:
        return "<answer>?</answer>"
    told = f"<information>{fact.number}</information>"
    return f"<search>{fact.asked}</search>{told}<answer>{fact.number}</answer>"


def write_data(folder: Path, known: Iterable[Fact], *, seed: int, demos: int, prompts: int) -> None:
    """corpus.jsonl, demos.jsonl, train.jsonl and held_out.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, real = random.Random(seed), list(known)
    write_corpus(folder / "corpus.jsonl", (Passage(f.asked, f.asked, "", f.number) for f in real))
    shown = (made_up(rng) for _ in range(demos))
    write_rows(
        folder / "demos.jsonl",
        (
            {"messages": [_asked(f), {"role": "assistant", "content": demonstration(f, rng)}]}
            for f in shown
        ),
    )
    train = [fact for fact in real if not is_held_out(fact.code)]
    write_rows(folder / "train.jsonl", map(_row, rng.choices(train, k=prompts)))
    write_rows(folder / "held_out.jsonl", (_row(fact) for fact in real if is_held_out(fact.code)))


def write_model(folder: Path, seed: int) -> None:
    """The random model of the quickstart with nine more words: the tags and what can be asked."""
    words = (*make_model.SPECIAL, *WORDS, *FACTS, *make_model.ROLES)
    make_model.write_model(folder, seed, words=words)


def _asked(fact: Fact) -> dict[str, str]:
    return {"role": "user", "content": fact.asked + "?"}


def _row(fact: Fact) -> dict[str, Any]:
    return {"prompt": [_asked(fact)], "label": fact.number}


def main() -> None:
    """Write data and model of one seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-demos", type=int, default=19200)
    parser.add_argument("--num-prompts", type=int, default=1920)
    given = parser.parse_args()
    write_data(
        given.folder / "data",
        facts(countries(data_folder())),
        seed=given.seed,
        demos=given.num_demos,
        prompts=given.num_prompts,
    )
    write_model(given.folder / "model", given.seed)


if __name__ == "__main__":
    main()
