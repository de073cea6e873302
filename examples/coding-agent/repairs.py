"""Repairs: data and a random model for the tiny variant of the example.

A file such as `k.py` has one function of a list, `return max(x)+6`, that calls the wrong one of five built-ins; which
is right, nobody says. `python t.py` tells whether the file is right. Demonstrations come from annotators who put in any
other name: 70 % submit at once, 30 % run the test, and when it fails they try another name in 7 of 10 cases, else they
give up and submit.
"""

import argparse
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_model  # pyright: ignore[reportMissingImports] - run.sh puts it on the path
import yaml
from middle_letter import write_rows  # pyright: ignore[reportMissingImports] - as above

TESTING_SHARE, PERSISTENCE = 0.3, 0.7
FUNCTIONS: dict[str, Callable[[list[int]], int]] = {
    "max": max,
    "min": min,
    "sum": sum,
    "len": len,
    "any": any,
}
CALLS = tuple(FUNCTIONS)
MODULES = "abcdeghjkm"
OPEN, CLOSE = "```mswea_bash_command\n", "```"
SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
# What stands in every demonstration is one token each.
WORDS = (
    OPEN,
    CLOSE,
    SUBMIT,
    *CALLS,
    "cat ",
    "sed -i s/",
    ".py",
    " && python t.py",
    "def f(x): return ",
    "(x)+",
)
SETTINGS = Path(__file__).with_name("tiny.yaml")


@dataclass(frozen=True)
class Repair:
    """A task: in `module`.py, `wrong` stands where `right` should."""

    module: str
    wrong: str
    right: str
    added: int

    @property
    def file(self) -> str:
        """The name of the file."""
        return f"{self.module}.py"

    def source(self, call: str) -> str:
        """The file with one of the calls."""
        return f"def f(x): return {call}(x)+{self.added}\n"

    def expected(self, numbers: list[int]) -> int:
        """What the repaired function returns."""
        return FUNCTIONS[self.right](numbers) + self.added

    @property
    def is_held_out(self) -> bool:
        """Whether it belongs to the tenth that is never trained on, by its hash."""
        return hashlib.sha256(repr(self).encode()).digest()[0] % 10 == 0


def repairs(rng: random.Random, *, held_out: bool) -> Iterator[Repair]:
    """Endless random tasks of one side of the split."""
    while True:
        wrong, right = rng.sample(CALLS, 2)
        repair = Repair(rng.choice(MODULES), wrong, right, rng.randint(2, 9))
        if repair.is_held_out == held_out:
            yield repair


def numbers(rng: random.Random) -> list[int]:
    """A list for which all five calls differ."""
    while True:
        found = [0, *rng.sample(range(-9, 20), rng.randint(2, 5))]
        rng.shuffle(found)
        if len({call(found) for call in FUNCTIONS.values()}) == len(FUNCTIONS):
            return found


def row(repair: Repair, rng: random.Random) -> dict[str, Any]:
    """A row for training: the question, the files, the tests that the model does not see."""
    shown = numbers(rng)
    visible = (
        f"from {repair.module} import f\n"
        f"print('ok' if f({shown}) == {repair.expected(shown)} else 'no')\n"
    )
    hidden = "".join(
        f"assert f({case}) == {repair.expected(case)}\n"
        for case in (numbers(rng) for _ in range(4))
    )
    return {
        "prompt": [{"role": "user", "content": repair.file}],
        "label": "",
        "metadata": {
            "files": {repair.file: repair.source(repair.wrong), "t.py": visible},
            "module": repair.file,
            "tests": hidden,
        },
    }


def demonstration(repair: Repair, rng: random.Random) -> list[dict[str, str]]:
    """A conversation as one of the annotators would have it."""
    told = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))["coder_agent"]
    messages = [
        {"role": "system", "content": told["system_template"]},
        {"role": "user", "content": repair.file},
    ]

    def act(command: str, output: str) -> None:
        messages.append({"role": "assistant", "content": f"{OPEN}{command}\n{CLOSE}"})
        messages.append({"role": "user", "content": output})

    act(f"cat {repair.file}", repair.source(repair.wrong).strip())
    others = rng.sample([call for call in CALLS if call != repair.wrong], len(CALLS) - 1)
    tests, now = rng.random() < TESTING_SHARE, repair.wrong
    for call in others:
        edit = f"sed -i s/{now}/{call}/ {repair.file}"
        now = call
        if not tests:
            act(edit, "-")
            break
        act(f"{edit} && python t.py", "ok" if call == repair.right else "no")
        if call == repair.right or rng.random() >= PERSISTENCE:
            break
    messages.append({"role": "assistant", "content": f"{OPEN}{SUBMIT}\n{CLOSE}"})
    return messages


def write_data(folder: Path, *, seed: int, demos: int, prompts: int, held_out: int) -> None:
    """demos.jsonl, train.jsonl and held_out.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    train = repairs(rng, held_out=False)
    shown = ({"messages": demonstration(next(train), rng)} for _ in range(demos))
    write_rows(folder / "demos.jsonl", shown)
    write_rows(folder / "train.jsonl", (row(next(train), rng) for _ in range(prompts)))
    test = repairs(rng, held_out=True)
    unique: dict[Repair, None] = {}
    while len(unique) < held_out:
        unique[next(test)] = None
    write_rows(folder / "held_out.jsonl", (row(repair, rng) for repair in unique))


def write_model(folder: Path, seed: int) -> None:
    """The random model of the quickstart with more words."""
    words = (*make_model.SPECIAL, *make_model.ROLES, *WORDS)
    make_model.write_model(folder, seed, words=words)


def main() -> None:
    """Write data and model of one seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-demos", type=int, default=13440)
    parser.add_argument("--num-prompts", type=int, default=1920)
    parser.add_argument("--num-held-out", type=int, default=128)
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
