"""`slime report RUN [OTHER_RUN ...]`: one HTML page that shows a run, or compares several."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slime.errors import ConfigError
from slime.observability.report.page import page_html
from slime.observability.report.run import run_data

EXIT_USAGE = 2
MAX_RUNS = 6  # as many as the page has colours


def report(argv: Sequence[str]) -> int:
    """Write the page; the exit code."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as error:  # argparse has told what is wrong
        return int(error.code or 0)
    try:
        path = write_report([Path(run) for run in args.runs], args.output, args.rounds)
    except ConfigError as error:
        sys.stderr.write(f"slime report: {error}\n")
        return EXIT_USAGE
    sys.stdout.write(f"{path}\n")
    return 0


def write_report(
    runs: Sequence[Path], output: Path | None = None, rounds: tuple[int, int] | None = None
) -> Path:
    """The page of these run folders; by default `report.html` in the first.

    Raises:
        ConfigError: a folder is no run, there are too many, or the page cannot be written.
    """
    if len(runs) > MAX_RUNS:
        raise ConfigError(f"{len(runs)} runs; a page compares at most {MAX_RUNS}")
    for run in runs:
        _check_run(run)
    names = _names(runs)
    data: dict[str, Any] = {
        "made": round(time.time()),
        "runs": [
            run_data(run, name=name, rounds=rounds, share=len(runs))
            for run, name in zip(runs, names, strict=True)
        ],
    }
    path = output or runs[0] / "report.html"
    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch(mode=0o600)  # it holds prompts and answers, as the run folder does
        partial.write_text(page_html(data, title=" vs ".join(names)), encoding="utf-8")
        partial.replace(path)  # a browser that reloads never sees half a page
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; choose a file with -o"
        ) from error
    return path


def _check_run(run: Path) -> None:
    if not run.is_dir():
        raise ConfigError(
            f"{run} is no folder; give the run folder, which the run's first line names"
        )
    parts = ("config.json", "metrics.jsonl", "samples", "ledger.jsonl", "timeline")
    if any((run / part).exists() for part in parts):
        return
    inside = sorted(path.parent.name for path in run.glob("*/config.json"))
    hint = f"; it holds runs: {', '.join(inside[:8])}" if inside else ""
    raise ConfigError(f"{run} is no run folder: none of {', '.join(parts)} is there{hint}")


def _names(runs: Sequence[Path]) -> list[str]:
    """The last two parts of the paths, more where they are needed to tell the runs apart."""
    parts = [Path(os.path.abspath(run)).parts for run in runs]  # a link keeps its own name
    for length in range(2, 1 + max(map(len, parts))):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({number})" for number, run in enumerate(runs, start=1)]


def _round_range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is no FIRST:LAST, as 100:120")
    return int(first), int(last)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slime report",
        description="Write one HTML page that shows a run, or compares several. It needs no server "
        "and no network; the run may still be going on.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; the first is the base")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="by default report.html in the first RUN"
    )
    parser.add_argument(
        "--rounds",
        type=_round_range,
        metavar="FIRST:LAST",
        help="rounds whose samples and timeline are shown; by default as many as fit",
    )
    return parser
