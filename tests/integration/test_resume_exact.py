"""A run whose processes die, one way or the other, is bit for bit the run in which none did.

Killed with -9 and started again with the same command: driver, rollout manager and train actor, one
after the other, each at a random moment after a checkpoint. Or an engine and the router die within
rounds and the run goes on by itself. `make test-trust` has the whole matrix (tests/trust).
"""

import random
import time

import pytest
from support.interrupted_runs import TrainingRun, assert_same_run
from support.resume_flags import make_run
from support.train_runs import Work

RESTARTS = ("rollout/engine_restarts", "rollout/router_restarts")


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


def test_an_engine_and_the_router_that_die_within_rounds_change_no_bit(
    work: Work, undisturbed: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIME_TEST_KILLS", "1:engine:KILL 3:router:KILL")
    # Two engines with four samples in flight each: a round lasts long enough to be hit in the
    # middle, and how many engines there are changes no bit either.
    few = ("--rollout-num-gpus", "2", "--sglang-server-concurrency", "4")
    run = make_run(work, "stormy", *few)
    run.finish()
    rows = run.metrics()
    assert [sum(row.pop(name, 0) for row in rows) for name in RESTARTS] == [1, 1]
    assert rows == undisturbed.metrics()
    assert run.rounds() == undisturbed.rounds()
    assert run.audit().problems == ()
