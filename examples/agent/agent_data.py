"""Data of the middle-letter task with a tool: demonstrations, prompts for training, held-out prompts.

Demonstrations come from two annotators: 30 % have the letters sorted and read the answer off, 70 % hastily
name the first letter.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from middle_letter import CAREFUL_SHARE, middle, prompts, write_data, write_rows  # pyright: ignore[reportMissingImports] - run.sh puts it on the path

TOOLS = [{"type": "function", "function": {"name": "sort"}}]


def demonstration(letters: str, rng: random.Random) -> dict[str, Any]:
    """A conversation as one of the two annotators would have it."""
    asked: dict[str, Any] = {"role": "user", "content": letters + "?"}
    if rng.random() >= CAREFUL_SHARE:
        return {"tools": TOOLS, "messages": [asked, {"role": "assistant", "content": letters[0]}]}
    call = {"type": "function", "function": {"name": "sort", "arguments": {"letters": letters}}}
    return {
        "tools": TOOLS,
        "messages": [
            asked,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "".join(sorted(letters))},
            {"role": "assistant", "content": middle(letters)},
        ],
    }


def main() -> None:
    """Write the data of one seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-demos", type=int, default=19200)
    parser.add_argument("--num-prompts", type=int, default=2560)
    parser.add_argument("--num-held-out", type=int, default=256)
    given = parser.parse_args()
    write_data(
        given.folder,
        seed=given.seed,
        num_demos=0,
        num_prompts=given.num_prompts,
        num_held_out=given.num_held_out,
    )
    rng = random.Random(f"agent {given.seed}")
    letters = prompts(rng, held_out=False)
    shown = (demonstration(next(letters), rng) for _ in range(given.num_demos))
    write_rows(given.folder / "demos.jsonl", shown)


if __name__ == "__main__":
    main()
