"""Products of two numbers: data and a random model for the tiny variant of the example.

A model of 0.2 M parameters cannot multiply in its head. Demonstrations come from two annotators: 40 % ask Python
and copy what it says, 60 % guess three digits.
"""

import argparse
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_model  # pyright: ignore[reportMissingImports] - run.sh puts it on the path
from middle_letter import write_rows  # pyright: ignore[reportMissingImports] - as above

TOOL_SHARE = 0.4
SMALLEST, LARGEST = 100, 999  # three digits, so that copying is all the model has to learn


def questions(rng: random.Random, *, held_out: bool) -> Iterator[tuple[int, int]]:
    """Endless random factors of one side of the split; a tenth of all pairs is held out, by their hash."""
    while True:
        pair = rng.randint(2, 9), rng.randint(11, 99)
        if not SMALLEST <= pair[0] * pair[1] <= LARGEST:
            continue
        if (hashlib.sha256(f"{pair}".encode()).digest()[0] % 10 == 0) == held_out:
            yield pair


def demonstration(left: int, right: int, rng: random.Random) -> list[dict[str, str]]:
    """A conversation as one of the two annotators would have it."""
    asked = {"role": "user", "content": f"{left}*{right}?"}
    if rng.random() >= TOOL_SHARE:
        return [asked, {"role": "assistant", "content": str(rng.randint(SMALLEST, LARGEST))}]
    return [
        asked,
        {"role": "assistant", "content": f"<code>print({left}*{right})</code>"},
        {"role": "tool", "content": str(left * right)},
        {"role": "assistant", "content": str(left * right)},
    ]


def write_data(folder: Path, *, seed: int, demos: int, prompts: int, held_out: int) -> None:
    """demos.jsonl, train.jsonl and held_out.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    train = questions(rng, held_out=False)
    shown = ({"messages": demonstration(*next(train), rng)} for _ in range(demos))
    write_rows(folder / "demos.jsonl", shown)
    write_rows(folder / "train.jsonl", (_row(*next(train)) for _ in range(prompts)))
    test = questions(rng, held_out=True)
    unique: dict[tuple[int, int], None] = {}
    while len(unique) < held_out:
        unique[next(test)] = None
    write_rows(folder / "held_out.jsonl", (_row(*pair) for pair in unique))


def write_model(folder: Path, seed: int) -> None:
    """The random model of the quickstart with two more words, and at most 60 of them."""
    words = (*make_model.SPECIAL, "<code>", "</code>", *make_model.ROLES)
    make_model.write_model(folder, seed, words=words)


def _row(left: int, right: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"{left}*{right}?"}
    return {"prompt": [question], "label": str(left * right)}


def main() -> None:
    """Write data and model of one seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-demos", type=int, default=19200)
    parser.add_argument("--num-prompts", type=int, default=1920)
    parser.add_argument("--num-held-out", type=int, default=32)
    given = parser.parse_args()
    write_data(
        given.folder / "data",
        seed=given.seed,
        demos=given.num_demos,
        prompts=given.num_prompts,
        held_out=given.num_held_out,
    )
    write_model(given.folder / "model", given.seed)


if __name__ == "__main__":
    main()
