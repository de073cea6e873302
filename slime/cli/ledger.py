"""`slime ledger RUN`: proof that no sample of a run was lost, doubled or trained twice."""

import sys
from pathlib import Path

from slime.errors import DataError
from slime.observability.ledger import read_events
from slime.observability.ledger_audit import Audit, audit

EXIT_UNCLEAN = 1
EXIT_USAGE = 2
_USAGE = "usage: slime ledger RUN    (the run's folder, or its ledger.jsonl)\n"


def show_ledger(argv: list[str]) -> int:
    """Print the audit of a run; 0 for a clean ledger, 1 for one with problems, 2 for none."""
    if len(argv) != 1 or argv[0].startswith("-"):
        sys.stderr.write(_USAGE)
        return EXIT_USAGE
    path = Path(argv[0])
    path = path / "ledger.jsonl" if path.is_dir() else path
    if not path.is_file():
        sys.stderr.write(f"slime ledger: there is no {path}; name the folder of a run\n")
        return EXIT_USAGE
    try:
        result = audit(read_events(path))
    except DataError as error:
        sys.stderr.write(f"slime ledger: {error}\n")
        return EXIT_UNCLEAN
    sys.stdout.write(audit_text(result))
    return 0 if result.is_clean else EXIT_UNCLEAN


def audit_text(result: Audit) -> str:
    """The audit as lines for a terminal."""
    counts = result.counts
    lines = [
        f"{counts['rounds']} rounds, {counts['optimizer_steps']} optimizer steps, "
        f"{counts['attempts']} starts",
        f"{counts['samples']} samples generated, {counts['trained']} trained, "
        f"{counts['failed']} failed; {counts['dropped_groups']} groups dropped by filters; "
        f"{counts['superseded_rounds']} rounds superseded by a resume",
        *(f"note: {note}" for note in result.notes),
        *(f"PROBLEM: {problem}" for problem in result.problems),
    ]
    if result.is_clean:
        lines.append("clean: no sample was lost, doubled or trained twice")
    return "\n".join(lines) + "\n"
