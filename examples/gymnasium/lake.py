"""FrozenLake of gymnasium for a tiny model: how it is told, and walks that show the form and no way.

    python lake.py FOLDER [--seed N]     writes FOLDER/demos.jsonl, train.jsonl and held_out.jsonl

The lake is 4 x 4, and every cell of ice is a start: the seed of an episode says which. The model is told the name of
its cell, repeats it and says where to go, such as "9r". In the demonstrations the way is drawn at random: they teach to
read the cell and to name a way, and not which.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from middle_letter import write_rows  # pyright: ignore[reportMissingImports] - run.sh puts it on the path

from slime.environments.gymnasium_text import GymnasiumText

ASKED = "ice?"
WAYS = "ldru"  # left, down, right, up, as gymnasium numbers them
CELLS = "0123456789abcefg"  # row by row; no d, which is a way
# S: a start, H: a hole, G: the goal.
LAKE = ("SSSS", "SHSH", "SSSH", "HSSG")
MAX_STEPS = 12
SETTINGS: dict[str, Any] = {
    "id": "FrozenLake-v1",
    "kwargs": {"desc": list(LAKE), "is_slippery": False, "max_episode_steps": MAX_STEPS},
    "observe": "lake.told",
    "act": "lake.way",
    "invalid": "end",
}


def told(observation: Any, env: Any) -> str:
    """The cell's name."""
    return CELLS[int(observation)]


def way(text: str, env: Any) -> int:
    """The number of the way in "9r".

    Raises:
        ValueError: it does not begin with the cell where the model stands, or names no way.
    """
    cell = CELLS[int(env.unwrapped.s)]
    if len(text) != 2 or text[0] != cell or text[1] not in WAYS:
        raise ValueError(f"it is not {cell} and one of {', '.join(WAYS)}")
    return WAYS.index(text[1])


def walk(seed: int, rng: random.Random) -> list[dict[str, str]]:
    """A conversation that walks at random until the episode ends."""
    lake = GymnasiumText(SETTINGS)
    place = lake.reset(seed)
    messages = [{"role": "user", "content": f"{ASKED}\n{place}"}]
    while True:
        answer = f"{place}{rng.choice(WAYS)}"
        messages.append({"role": "assistant", "content": answer})
        step = lake.step(answer)
        if step.terminated or step.truncated:
            return messages
        place = step.observation
        messages.append({"role": "user", "content": str(place)})


def first_seeds() -> list[int]:
    """One seed for each start."""
    lake, found = GymnasiumText(SETTINGS), dict[str, int]()
    num_starts = "".join(LAKE).count("S")
    seed = 0
    while len(found) < num_starts:
        found.setdefault(str(lake.reset(seed)), seed)
        seed += 1
    return sorted(found.values())


def main() -> None:
    """Write the data of one seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-demos", type=int, default=9600)
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(given.seed)
    walks = ({"messages": walk(rng.randrange(2**31), rng)} for _ in range(given.num_demos))
    write_rows(folder / "demos.jsonl", walks)
    asked = {"prompt": [{"role": "user", "content": ASKED}], "label": ""}
    # One row is enough: each time it is taken, its episode has another seed.
    write_rows(folder / "train.jsonl", [asked])
    each = ({**asked, "metadata": {"seed": seed}} for seed in first_seeds())
    write_rows(folder / "held_out.jsonl", each)


if __name__ == "__main__":
    main()
