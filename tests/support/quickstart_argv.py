"""The quickstart's own command lines, as `run.sh` would run them, with its model and a little data."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"

# Stands in for Python: notes what it is called with, one word per line, and does nothing.
_RECORDER = """\
#!/bin/sh
printf 'CALL\\n' >> "$RECORD"
printf '%s\\n' "$@" >> "$RECORD"
"""


@dataclass(frozen=True)
class Quickstart:
    """Folder with `data/`, `model/` and `sft/hf/`; the words after `python` of both stages."""

    path: Path
    sft: tuple[str, ...]
    grpo: tuple[str, ...]


def make_quickstart(folder: Path) -> Quickstart:
    """The quickstart as it stands before its first stage, and its second stage's model."""
    calls = _recorded_calls(folder)
    for script, target in (("make_model.py", "model"), ("make_model.py", "sft/hf")):
        _run(script, str(folder / target))
    sizes = ("--num-demos", "2000", "--num-prompts", "96", "--num-held-out", "16")
    _run("middle_letter.py", str(folder / "data"), *sizes)
    by_script = {Path(words[0]).name: words for words in calls}
    return Quickstart(folder, by_script["train_async.py"], by_script["train.py"])


def _recorded_calls(folder: Path) -> list[tuple[str, ...]]:
    recorder, record = folder / "recorder.sh", folder / "calls.txt"
    recorder.write_text(_RECORDER)
    recorder.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(recorder), "RECORD": str(record)}
    command = ["bash", str(QUICKSTART / "run.sh"), "0", str(folder)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    calls = record.read_text().split("CALL\n")[1:]
    return [tuple(call.splitlines()) for call in calls]


def _run(script: str, *words: str) -> None:
    subprocess.run([sys.executable, str(QUICKSTART / script), *words], check=True)


def changed(argv: tuple[str, ...], **changes: str | None) -> list[str]:
    """`argv` with flags changed.

    Args:
        changes: flag in dest form -> its words, split at spaces; "" is a switch; None leaves it out.
    """
    words = list(argv)
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        if flag in words:
            start = words.index(flag)
            end = start + 1
            while end < len(words) and not words[end].startswith("--"):
                end += 1
            del words[start:end]
        if value is not None:
            words += [flag, *value.split()]
    return words
