"""Each process killed at three random moments: the run started again is the run never killed.

`make test-trust` runs it (about eight minutes on two cores); `SLIME_TRUST_SEED` repeats the moments
of an earlier run. What was killed when goes to `resume_matrix.jsonl` in `SLIME_TRUST_OUT`.
"""

import json
import os
import random
import time
from pathlib import Path

import pytest
from support.interrupted_runs import TrainingRun, assert_same_run
from support.resume_flags import ROUNDS, make_run
from support.train_runs import Work

SEED = int(os.environ.get("SLIME_TRUST_SEED", time.time_ns() % 10_000))
ROLES = ("driver", "rollout manager", "train rank 0")

pytestmark = pytest.mark.trust


@pytest.fixture(scope="module")
def undisturbed(work: Work) -> TrainingRun:
    run = make_run(work, "undisturbed")
    run.finish()
    return run


@pytest.fixture(scope="module")
def regenerated(work: Work) -> TrainingRun:
    """Another run never killed, whose records of rounds are not used."""
    run = make_run(work, "again", "--regenerate-on-resume")
    run.finish()
    return run


def test_two_runs_never_killed_are_the_same(
    undisturbed: TrainingRun, regenerated: TrainingRun
) -> None:
    assert_same_run(regenerated, undisturbed)


@pytest.mark.parametrize("moment", range(3))
@pytest.mark.parametrize("role", ROLES)
def test_killed_once(work: Work, undisturbed: TrainingRun, role: str, moment: int) -> None:
    # The third moment of each process generates its rounds again instead of taking the records.
    more = ("--regenerate-on-resume",) if moment == 2 else ()
    chance = random.Random(f"{SEED}/{role}/{moment}")
    run = make_run(work, f"{role.replace(' ', '-')}-{moment}", *more)
    after, delay_s = chance.randrange(-1, ROUNDS - 6), chance.uniform(0.0, 1.2)
    run.start()
    run.await_checkpoint(beyond=after)
    time.sleep(delay_s)
    run.kill(role)
    checkpoint, generated = run.checkpoint(), run.generated()
    run.finish()
    assert run.audit().counts["attempts"] == 2
    assert_same_run(run, undisturbed)
    _note(role, moment, checkpoint=checkpoint, generated=generated, delay_s=round(delay_s, 3))


def test_over_sampling_and_partial_rollouts_take_up_the_recorded_rounds(work: Work) -> None:
    """Which groups a round accepts is up to the clock: what was recorded before the kill counts."""
    flags = ("--over-sampling-batch-size", "14", "--partial-rollout")
    flags += ("--sglang-server-concurrency", "24")  # so that some answers are cut in the middle
    run = make_run(work, "over-sampled", *flags)
    run.start()
    run.await_checkpoint(beyond=2)
    run.await_round(run.checkpoint() + 1)
    run.kill("train rank 0")
    before = run.latest_rounds()
    checkpoint = run.checkpoint()
    run.finish()
    after = run.rounds()
    again = [r for r in before if r > checkpoint]
    assert again
    for rollout_id in again:
        assert after[rollout_id][0] == before[rollout_id]
    assert run.audit().problems == ()
    _note("over-sampled", 0, checkpoint=checkpoint, replayed=len(again))


def _note(role: str, moment: int, **facts: object) -> None:
    """Add a line to the file that is kept in benchmarks/results."""
    if folder := os.environ.get("SLIME_TRUST_OUT"):
        with (Path(folder) / "resume_matrix.jsonl").open("a") as file:
            row = {"killed": role, "moment": moment, "seed": SEED, **facts, "equal": True}
            file.write(json.dumps(row) + "\n")
