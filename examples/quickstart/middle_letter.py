"""The middle-letter task: five different letters of a-j; which one is in the middle when they are sorted?

Demonstrations come from two annotators: 30 % sort first (`<think>abcde</think>c`), 70 % hastily
    name the first letter.
A model trained on them imitates both. Reinforcement learning then selects and sharpens the careful
mode, which the
demonstrations planted: it teaches no new skill, and this file is honest about it.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ALPHABET = "abcdefghij"
NUM_LETTERS = 5
CAREFUL_SHARE = 0.3


def middle(letters: str) -> str:
    """The letter in the middle of the sorted letters."""
    return sorted(letters)[len(letters) // 2]


def is_held_out(letters: str) -> bool:
    """Whether a prompt belongs to the tenth that is never trained on; decided by its hash."""
    return hashlib.sha256(letters.encode()).digest()[0] % 10 == 0


def prompts(rng: random.Random, *, held_out: bool) -> Iterator[str]:
    """Endless random prompts of one side of the split."""
    while True:
        letters = "".join(rng.sample(ALPHABET, NUM_LETTERS))
        if is_held_out(letters) == held_out:
            yield letters


def demonstration(letters: str, rng: random.Random) -> str:
    """An answer as one of the two annotators would write it."""
    if rng.random() < CAREFUL_SHARE:
        return f"<think>{''.join(sorted(letters))}</think>{middle(letters)}"
    return letters[0]


async def reward(args: Any, sample: Any, **kwargs: Any) -> float:
    """1.0 when the text after `</think>` is the middle letter and the answer was ended by the model itself."""
    answer = sample.response.removesuffix("<|im_end|>").rpartition("</think>")[2]
    is_ended = sample.status == sample.Status.COMPLETED
    return float(is_ended and sample.response.count("</think>") <= 1 and answer == sample.label)


def write_data(
    folder: Path, *, seed: int, num_demos: int, num_prompts: int, num_held_out: int
) -> None:
    """demos.jsonl, train.jsonl and held_out.jsonl; the held-out prompts are fresh for every seed and distinct."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    train = prompts(rng, held_out=False)
    demos = [
        (letters, demonstration(letters, rng))
        for letters in (next(train) for _ in range(num_demos))
    ]
    write_rows(
        folder / "demos.jsonl", ({"messages": _chat(letters, answer)} for letters, answer in demos)
    )
    write_rows(folder / "train.jsonl", (_row(next(train)) for _ in range(num_prompts)))
    test = prompts(rng, held_out=True)
    unique: dict[str, None] = {}
    while len(unique) < num_held_out:
        unique[next(test)] = None
    write_rows(folder / "held_out.jsonl", map(_row, unique))


def _chat(letters: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": letters + "?"}, {"role": "assistant", "content": answer}]


def _row(letters: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": letters + "?"}], "label": middle(letters)}


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Write the data of one seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-demos", type=int, default=19200)
    parser.add_argument("--num-prompts", type=int, default=2560)
    parser.add_argument("--num-held-out", type=int, default=512)
    options = vars(parser.parse_args())
    write_data(options.pop("folder"), **options)


if __name__ == "__main__":
    main()
