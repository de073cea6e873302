"""Rows for the agent from problems in MBPP's form: a description, and assert statements of which one is shown.

    python mbpp_tasks.py sanitized-mbpp.json FOLDER     writes FOLDER/train.jsonl and FOLDER/held_out.jsonl

MBPP (Austin et al. 2021, arXiv:2108.07732) has `text` or, sanitized, `prompt`, and `test_list`, `test_setup_code` or
`test_imports`; as one JSON array, or as one object a line.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODULE = "solution.py"


def row(problem: Mapping[str, Any]) -> dict[str, Any] | None:
    """One task; None where a shown test would leave no hidden one."""
    shown, *hidden = problem["test_list"]
    if not hidden:
        return None
    setup = problem.get("test_imports") or [problem.get("test_setup_code") or ""]
    question = f"Write {MODULE}: {problem.get('prompt') or problem['text']}\nFor example:\n{shown}"
    return {
        "prompt": [{"role": "user", "content": question}],
        "label": "",
        "metadata": {
            "files": {},
            "module": MODULE,
            # The example as well: code that fails it is not what was asked for.
            "tests": "\n".join([*setup, shown, *hidden]) + "\n",
        },
    }


def read_problems(path: Path) -> list[dict[str, Any]]:
    """All problems of a file."""
    text = path.read_text(encoding="utf-8")
    return (
        json.loads(text) if text.lstrip().startswith("[") else [*map(json.loads, text.splitlines())]
    )


def is_held_out(problem: Mapping[str, Any]) -> bool:
    """Whether a problem is of the tenth that is never trained on, by the hash of its tests."""
    return hashlib.sha256("\n".join(problem["test_list"]).encode()).digest()[0] % 10 == 0


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problems", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    problems = read_problems(given.problems)
    for name, held_out in (("train", False), ("held_out", True)):
        rows = [row(problem) for problem in problems if is_held_out(problem) == held_out]
        lines = [json.dumps(each) + "\n" for each in rows if each is not None]
        (given.folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
