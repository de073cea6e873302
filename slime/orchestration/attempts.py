"""Starting a run in its folder, for the first time or again: what counts, and what is superseded."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from slime.config.config import Config
from slime.errors import ConfigError
from slime.observability.doctor import live_processes
from slime.observability.ledger import Ledger, Lineage, lineage, read_events
from slime.observability.runs import RunFolder

logger = logging.getLogger(__name__)

SUPERSEDED = "metrics.superseded.jsonl"
PREDECESSORS_TIMEOUT_S = 30.0


def begin_attempt(
    folder: RunFolder, config: Config, first_rollout: int
) -> tuple[Ledger, str | None]:
    """The run's ledger, with this start written into it; metrics of rounds to come are put aside.

    And the digest of the weights that wrote round `first_rollout`, if it was begun before the
    checkpoint that this start goes on from.

    Raises:
        ConfigError: the folder's run has a checkpoint and this start would begin at round 0 again.
        DataError: the ledger is damaged.
    """
    before = lineage(read_events(folder.ledger))
    if first_rollout == 0 and before.checkpoint is not None:
        raise ConfigError(_restart_message(before, config, folder.path))
    if before.attempts and first_rollout > before.next_rollout:
        logger.warning(
            "this run folder knows of %d rounds and the checkpoint goes on at round %d: what lies "
            "between is in no ledger here; was it trained in another --run-dir?",
            before.next_rollout,
            first_rollout,
        )
    moved = put_metrics_aside(folder.metrics, first_rollout)
    ledger = Ledger(folder.ledger)
    number = ledger.attempt(first_rollout)
    if before.attempts:
        logger.info(
            "attempt %d goes on at round %d; %d rounds of before are done again, their %d rows of "
            "metrics moved to %s",
            number,
            first_rollout,
            max(0, before.next_rollout - first_rollout),
            moved,
            SUPERSEDED,
        )
    checkpoint = before.checkpoint or {}
    is_ours = checkpoint.get("rollout_id") == first_rollout - 1
    return ledger, checkpoint.get("upcoming") if is_ours else None


def await_predecessors(run_dir: Path, timeout_s: float = PREDECESSORS_TIMEOUT_S) -> None:
    """Return once no process of an earlier start of this run is alive on this machine.

    A killed driver leaves actors behind for a second or two; one of them may be writing a
    checkpoint.

    Raises:
        ConfigError: some are still there after `timeout_s`; names them with their ids.
    """
    deadline = time.monotonic() + timeout_s
    while alive := [note for note in live_processes(run_dir) if note.pid != os.getpid()]:
        names = ", ".join(f"{note.role} (pid {note.pid})" for note in alive)
        if time.monotonic() > deadline:
            raise ConfigError(
                f"processes of an earlier start still run in {run_dir}: {names}. They could write "
                "into the same checkpoint: end them (kill, by these ids), or give another --run-dir."
            )
        logger.debug("waiting for the end of %s", names)
        time.sleep(0.1)


def put_metrics_aside(path: Path, first_rollout: int) -> int:
    """Move rows of rounds from `first_rollout` on to `metrics.superseded.jsonl`; how many it were.

    The file then has one row per step, as if the run had never been interrupted.
    """
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = _rows_to_keep(lines, first_rollout)
    if kept == len(lines):
        return 0
    with path.with_name(SUPERSEDED).open("ab") as aside:
        aside.writelines(line for line in lines[kept:] if line.endswith(b"\n"))
    draft = path.with_name(path.name + ".partial")
    draft.write_bytes(b"".join(lines[:kept]))
    os.replace(draft, path)
    return len(lines) - kept


def _rows_to_keep(lines: list[bytes], first_rollout: int) -> int:
    """Rows are written in order: a round's steps, its own row, the evaluation after it."""
    kept = 0
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        is_row_before = row.get("rollout/step", first_rollout) < first_rollout
        is_eval_before = 0 < row.get("eval/step", first_rollout + 1) <= first_rollout
        if is_row_before or is_eval_before:
            kept = number
        elif first_rollout > 0 and row.get("eval/step") == 0:
            kept = max(kept, number)
    return kept


def _row(line: bytes) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        return {}
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _restart_message(before: Lineage, config: Config, folder: Path) -> str:
    assert before.checkpoint is not None
    found, rollout_id = before.checkpoint["folder"], before.checkpoint["rollout_id"]
    if config.start_rollout_id is not None and config.load == found:
        reason = "--start-rollout-id or --finetune says so"
    elif config.save == found and not os.path.isdir(found):
        reason = f"{found} is gone"
    else:
        reason = f"--load names another folder, or none; give --load {found}"
    return (
        f"the run in {folder} has a checkpoint after round {rollout_id} in {found}, but this start "
        f"would begin again at round 0: {reason}. To begin anew, give another --run-dir."
    )
