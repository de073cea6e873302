"""A run whose processes are killed is bit for bit the run in which none was.

Killed with -9 and started again with the same command: driver, rollout manager and train actor, one
after the other, each at a random moment after a checkpoint. `make test-trust` has the whole matrix,
and engines and the router that die within rounds while the run goes on by itself (tests/trust).
"""

import pytest
from support.interrupted_runs import TrainingRun, assert_same_run, finish_through_kills
from support.resume_flags import make_run
from support.train_runs import Work

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def undisturbed(work: Work) -> TrainingRun:
    run = make_run(work, "undisturbed")
    run.finish()
    return run


def test_killed_three_times_is_the_run_never_killed(work: Work, undisturbed: TrainingRun) -> None:
    run = make_run(work, "killed")
    finish_through_kills(run)
    assert_same_run(run, undisturbed)
