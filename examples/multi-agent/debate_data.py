"""Data of the middle-letter task for two roles: demonstrations for solvers and judges, prompts for training.

Solvers are shown as in the quickstart. Judges are shown too: 30 % sort the letters themselves, 70 % hastily
repeat the first proposal.
"""

import argparse
import json
import random
from pathlib import Path

from middle_letter import CAREFUL_SHARE, middle, prompts, write_data  # pyright: ignore[reportMissingImports] - run.sh puts it on the path

NUM_SOLVERS = 3


def judge_demonstration(letters: str, rng: random.Random) -> tuple[str, str]:
    """(what a judge is asked, what it answers)."""
    proposals = [rng.choice(letters) for _ in range(NUM_SOLVERS)]
    question = f"{letters}? {','.join(proposals)}"
    if rng.random() < CAREFUL_SHARE:
        return question, f"<think>{''.join(sorted(letters))}</think>{middle(letters)}"
    return question, proposals[0]


def add_judges(folder: Path, *, seed: int, num_demos: int) -> None:
    """Append demonstrations of judges to demos.jsonl, in a random order with the others."""
    rng = random.Random(f"judges {seed}")
    letters = prompts(rng, held_out=False)
    rows = (folder / "demos.jsonl").read_text().splitlines()
    for _ in range(num_demos):
        question, answer = judge_demonstration(next(letters), rng)
        rows.append(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ]
                }
            )
        )
    rng.shuffle(rows)
    (folder / "demos.jsonl").write_text("\n".join(rows) + "\n")


def main() -> None:
    """Write the data of one seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-demos", type=int, default=9600, help="for each role")
    parser.add_argument("--num-prompts", type=int, default=2560)
    parser.add_argument("--num-held-out", type=int, default=512)
    given = parser.parse_args()
    write_data(
        given.folder,
        seed=given.seed,
        num_demos=given.num_demos,
        num_prompts=given.num_prompts,
        num_held_out=given.num_held_out,
    )
    add_judges(given.folder, seed=given.seed, num_demos=given.num_demos)


if __name__ == "__main__":
    main()
