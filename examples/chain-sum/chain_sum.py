"""The chain-sum task of reasoning-gym with a language model: two numbers of one or two digits, added or subtracted.

    pip install reasoning-gym
    python examples/chain-sum/chain_sum.py FOLDER

writes train.jsonl, held_out.jsonl, and dev.jsonl, by which to choose settings. A pair of numbers belongs to one of them
in either order and with either sign: what is held out was never trained on, not even as its reverse. No problem comes
twice: reasoning-gym draws one digit as often as two, of which there are a hundred times as many problems, so that most
have two. Half of dev.jsonl and held_out.jsonl are sums, a quarter of train.jsonl.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUMBER = re.compile(r"-?\d+")
# Which of ten parts of all pairs go where; the rest is trained on.
PARTS = {0: "held_out", 1: "dev"}
# Sums are learned first and differences are what is left (README): one sum in so many is trained on.
SUMS_TRAINED = 3
TASK = "State the final answer to each arithmetic problem."
# Turns before every problem: the model answers in their form at once, and ends. The second shows a step for a result
# below zero, so that there is one skill to learn, the smaller number from the larger; without it these came last.
EXAMPLES = {"38 + 45": "83", "27 - 62": "-(62 - 27) = -35"}


def file_of(numbers: tuple[int, int]) -> str:
    """To which file these two numbers belong, in either order: `train`, or a tenth each to `dev` and `held_out`."""
    text = "{} {}".format(*sorted(numbers))
    return PARTS.get(hashlib.sha256(text.encode()).digest()[0] % 10, "train")


def is_trained(numbers: tuple[int, int], sign: str) -> bool:
    """Whether a problem of the part to train on is trained on: every difference, one sum in SUMS_TRAINED."""
    text = "{} {}".format(*numbers)
    return sign == "-" or hashlib.sha256(text.encode()).digest()[1] % SUMS_TRAINED == 0


def last_number(text: str) -> str | None:
    """The last whole number of an answer, such as "-7"; None without any."""
    found = NUMBER.findall(text.replace("\u2212", "-"))
    return str(int(found[-1])) if found else None


def likeness(found: str | None, label: str) -> float:
    """The share of sign and digits that are right, the shorter number with zeros before it; 0.0 beyond three digits."""
    if found is None or abs(int(found)) > 999:
        return 0.0
    width = max(len(found.lstrip("-")), len(label.lstrip("-"))) + 1
    ours, theirs = f"{int(found):+0{width}d}", f"{int(label):+0{width}d}"
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / width


async def reward(args: Any, sample: Any, **kwargs: Any) -> dict[str, float]:
    """`right`: 1.0 when the last number of the answer is the result and the model ended the answer itself, else 0.0.

    `score`: the same, but a wrong number has half its likeness, as two digits are learned one by one, and a quarter if
    the answer has the right step (`opposite` of the row's metadata) on its way to a result below zero.
    """
    is_ended = sample.status == sample.Status.COMPLETED
    found = last_number(sample.response) if is_ended else None
    right = float(found == sample.label)
    opposite = sample.metadata.get("opposite")
    has_step = is_ended and opposite is not None and f"({opposite})" in sample.response
    return {"right": right, "score": right or likeness(found, sample.label) / 2 + has_step / 4}


def problems(seed: int) -> Iterator[tuple[tuple[int, int], str, str]]:
    """(numbers, problem, answer), a hundred thousand of them, as reasoning-gym draws them."""
    import reasoning_gym  # pyright: ignore[reportMissingImports] (the task, not needed to train)

    size = 100_000
    drawn: Any = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=2, seed=seed, size=size
    )
    for i in range(size):
        row = drawn[i]
        problem = row["metadata"]["expression"]
        first, _, second = problem.split()
        yield (int(first), int(second)), problem, row["answer"]


def conversation(problem: str) -> list[dict[str, str]]:
    """What the model sees: the task, EXAMPLES as turns, and this problem."""
    turns = [{"role": "system", "content": TASK}]
    for example, result in EXAMPLES.items():
        turns.append({"role": "user", "content": f"{example} ="})
        turns.append({"role": "assistant", "content": f"{example} = {result}"})
    return [*turns, {"role": "user", "content": f"{problem} ="}]


def write_data(folder: Path, *, seed: int, num_train: int, num_held_out: int) -> None:
    """The three files, rows with a chat `prompt` and a `label`; dev.jsonl is as long as held_out.jsonl.

    Raises:
        ValueError: reasoning-gym's problems ended before there were enough.
    """
    files: dict[str, dict[str, None]] = {"train": {}, "dev": {}, "held_out": {}}
    sizes = {"train": num_train, "dev": num_held_out, "held_out": num_held_out}
    for numbers, problem, answer in problems(seed):
        row: dict[str, Any] = {"prompt": conversation(problem), "label": answer}
        if int(answer) < 0:
            row["metadata"] = {"opposite": "{1} - {0}".format(*numbers)}
        name = file_of(numbers)
        if name == "train" and not is_trained(numbers, problem.split()[1]):
            continue
        if len(files[name]) < sizes[name]:
            files[name][json.dumps(row)] = None
        if all(len(files[name]) == size for name, size in sizes.items()):
            break
    else:
        found = {name: len(rows) for name, rows in files.items()}
        raise ValueError(f"reasoning-gym gave {found} problems, not {sizes}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(row + "\n" for row in rows))


def main() -> None:
    """Write the data of one seed."""
    parser = argparse.ArgumentParser(description="The data of one seed.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train", type=int, default=8_000)
    parser.add_argument("--num-held-out", type=int, default=512)
    options = vars(parser.parse_args())
    write_data(options.pop("folder"), **options)


if __name__ == "__main__":
    main()
