"""`slime check`: the flags of train.py in, a summary or every problem at once out."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slime.check.checker import Checked, check, collected_notes
from slime.check.places import FreeBytes, free_disk_bytes
from slime.check.plan import Cluster
from slime.cli.parse import parse_into
from slime.config.problems import Problems
from slime.config.resolve import resolve_into
from slime.errors import ConfigError, numbered

EXIT_USAGE = 2
USAGE = """\
usage: slime check [--nodes N] [--gpus-per-node N] [--] [train.py | train_async.py] FLAGS...

  Judge the flags of a run without starting it: rules, files, the first rows of data through the
  chat template, functions, ports, disk. Prints what the run will do (exit code 0), or every problem
  at once (exit code 2).

  --nodes, --gpus-per-node   machines that the run is meant for, when they are not this one
"""
_SCRIPTS = ("train.py", "train_async.py")


@dataclass(frozen=True)
class CheckArgs:
    """The command line of `slime check`: its own options, and the run's."""

    cluster: Cluster | None
    script: Path | None
    argv: tuple[str, ...]


def run_check(argv: Sequence[str], *, free_bytes: FreeBytes = free_disk_bytes) -> int:
    """Exit code of `slime check`."""
    began = time.perf_counter()
    if not argv or "--help" in argv or "-h" in argv:
        sys.stdout.write(USAGE + "\nThe run's flags: slime train --help\n")
        return 0
    try:
        args = split_args(argv)
    except ConfigError as error:
        sys.stderr.write(f"slime check: {error}\n{USAGE}")
        return EXIT_USAGE
    result = check_argv(args, free_bytes=free_bytes)
    seconds = time.perf_counter() - began
    _write(result, seconds)
    return EXIT_USAGE if result.problems else 0


def check_argv(args: CheckArgs, *, free_bytes: FreeBytes = free_disk_bytes) -> Checked:
    """The judgement of a command line."""
    problems = Problems()
    with collected_notes() as notes:
        config = resolve_into(problems, parse_into(problems, args.argv))
    found = check(
        config,
        problems,
        overlaps=args.script is not None and args.script.name == "train_async.py",
        # As Python does it for `python folder/train.py`, and `slime train` for this folder.
        folders=(str(args.script.parent) if args.script is not None else ".",),
        cluster=args.cluster,
        free_bytes=free_bytes,
    )
    return Checked(found.problems, (*notes, *found.notes), found.summary)


def split_args(argv: Sequence[str]) -> CheckArgs:
    """What stands before the run's own flags, and those.

    Raises:
        ConfigError: an option of `slime check` without a number.
    """
    words = list(argv)
    own: dict[str, int] = {}
    while words and words[0].partition("=")[0] in ("--nodes", "--gpus-per-node"):
        name, is_joined, value = words.pop(0).partition("=")
        if not is_joined:
            value = words.pop(0) if words else ""
        if not value.isdigit() or int(value) < 1:
            raise ConfigError(f"{name} takes a number from 1 on, found {value!r}")
        own[name] = int(value)
    if words and words[0] == "--":
        words.pop(0)
    script = None
    if words and Path(words[0]).name in _SCRIPTS:
        script = Path(words.pop(0))
    cluster = Cluster(own.get("--nodes", 1), own.get("--gpus-per-node", 8)) if own else None
    return CheckArgs(cluster, script, tuple(words))


def _write(result: Checked, seconds: float) -> None:
    notes = "".join(f"note: {text}\n" for text in result.notes)
    if not result.problems:
        head = f"This run can start ({seconds:.1f} s, nothing was started).\n"
        sys.stdout.write(f"{head}\n{result.summary}{notes and chr(10) + notes}")
        return
    count = len(result.problems)
    head = "1 problem" if count == 1 else f"{count} problems"
    sys.stderr.write(f"{notes}slime check: {head} ({seconds:.1f} s, nothing was started)\n")
    sys.stderr.write(numbered(result.problems) + "\n")
