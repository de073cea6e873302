"""train_async.py killed and started again is bit for bit the run in which nothing was killed.

The round after a checkpoint was begun with weights that no checkpoint has: it is taken up from its record.
"""

import pytest
from support.interrupted_runs import TrainingRun, assert_same_run, finish_through_kills
from support.resume_flags import make_run
from support.train_runs import Work

from slime.observability.ledger import read_events

pytestmark = pytest.mark.runs


def make_async_run(work: Work, name: str) -> TrainingRun:
    run = make_run(work, name)
    run.script = "train_async.py"
    return run


def test_killed_three_times_is_the_run_never_killed(work: Work) -> None:
    undisturbed = make_async_run(work, "async-undisturbed")
    undisturbed.finish()
    run = make_async_run(work, "async-killed")
    finish_through_kills(run)
    assert_same_run(run, undisturbed)
    log = (run.folder / "logs" / "rollout-manager.log").read_text()
    starts = [e["first_rollout"] for e in read_events(run.folder / "ledger.jsonl")
              if e["event"] == "attempt"]  # fmt: skip
    for first in starts[1:]:
        assert f"rollout {first} is taken from the record of an earlier start" in log
