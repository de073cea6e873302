"""The countdown task: "k17?" -> "k17 k16 ... k01"; how many numbers there are is heavy-tailed.

The count is log-normal, median 6, at most 63: answers have 24 tokens in the median and up to 252, and what a
round waits for is its longest answer. Annotators are sloppy: they skip each number inside with a
chance of 8 %. A model trained on them skips as well, and reinforcement learning has to end that.
"""

import argparse
import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MEDIAN_COUNT, SIGMA, MAX_COUNT = 6, 1.0, 63
SKIP_CHANCE = 0.08
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MAX_RESPONSE_LEN = 256

# The model: 4.5 million parameters over the quickstart's tokenizer.
SHAPE = {"hidden": 256, "heads": 8, "head_dim": 32, "layers": 6, "kv_heads": 2, "positions": 512}


def draw(rng: random.Random) -> tuple[str, int]:
    """(letter, count) of a countdown."""
    while True:
        count = round(math.exp(rng.gauss(math.log(MEDIAN_COUNT), SIGMA)))
        if 2 <= count <= MAX_COUNT:
            return rng.choice(LETTERS), count


def text_of(letter: str, numbers: Iterable[int]) -> str:
    """An answer with these numbers."""
    return " ".join(f"{letter}{number:02d}" for number in numbers)


def countdown(letter: str, count: int) -> str:
    """The right answer, 4 x count tokens with the one that ends it."""
    return text_of(letter, range(count, 0, -1))


def demonstration(letter: str, count: int, rng: random.Random) -> str:
    """What a sloppy annotator writes: some numbers between the first and 01 are missing."""
    inside = [n for n in range(count - 1, 1, -1) if rng.random() >= SKIP_CHANCE]
    return text_of(letter, [count, *inside, 1])


async def reward(args: Any, sample: Any, **kwargs: Any) -> float:
    """1.0 when every number is there and the model itself ended the answer."""
    is_ended = sample.status == sample.Status.COMPLETED
    return float(is_ended and sample.response.removesuffix("<|im_end|>") == sample.label)


def write_data(folder: Path, *, seed: int, num_demos: int, num_prompts: int) -> None:
    """demos.jsonl and train.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    demos = [(pair, demonstration(*pair, rng)) for pair in (draw(rng) for _ in range(num_demos))]
    _write(folder / "demos.jsonl", ({"messages": _chat(*pair, text)} for pair, text in demos))
    pairs = [draw(rng) for _ in range(num_prompts)]
    _write(
        folder / "train.jsonl",
        ({"prompt": _chat(*pair), "label": countdown(*pair)} for pair in pairs),
    )


def write_model(folder: Path, seed: int) -> None:
    """A random model with the quickstart's tokenizer."""
    import make_model  # of examples/quickstart, on PYTHONPATH

    make_model.write_model(folder, seed, make_model.Size(**SHAPE))


def _chat(letter: str, count: int, answer: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": f"{letter}{count:02d}?"}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Write data and random model of one seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-demos", type=int, default=12800)
    parser.add_argument("--num-prompts", type=int, default=2560)
    options = parser.parse_args()
    write_data(
        options.folder / "data",
        seed=options.seed,
        num_demos=options.num_demos,
        num_prompts=options.num_prompts,
    )
    write_model(options.folder / "model", options.seed)


if __name__ == "__main__":
    main()
