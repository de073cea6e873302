"""A run whose processes are killed is bit for bit the run in which none was.

Killed with -9 and started again with the same command: driver, rollout manager and train actor, one
after the other, each at a random moment after a checkpoint. `make test-trust` has the whole matrix,
and engines and the router that die within rounds while the run goes on by itself (tests/trust).
"""

import random
import time

import pytest
from support.interrupted_runs import TrainingRun, assert_same_run
from support.resume_flags import make_run
from support.train_runs import Work


@pytest.fixture(scope="module")
def undisturbed(work: Work) -> TrainingRun:
    run = make_run(work, "undisturbed")
    run.finish()
    return run


def test_killed_three_times_is_the_run_never_killed(work: Work, undisturbed: TrainingRun) -> None:
    moments = random.Random(time.time_ns())
    run = make_run(work, "killed")
    for role in ("driver", "rollout manager", "train rank 0"):
        run.start()
        run.await_checkpoint(beyond=run.checkpoint())
        # About a round: three kills and their checkpoints must fit into the run.
        time.sleep(moments.uniform(0.0, 0.4))
        run.kill(role)
    run.finish()
    assert run.audit().counts["attempts"] == 4
    assert_same_run(run, undisturbed)
