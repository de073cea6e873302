"""train_async.py --fully-async: to its end, and killed and started again; real trainer, engine and router."""

import json
from typing import Any

import pytest
from support.interrupted_runs import TrainingRun
from support.train_runs import Work

from slime.observability.ledger import lineage, read_events
from slime.observability.trackers import read_metrics

pytestmark = pytest.mark.runs

ROUNDS, GROUPS, SAMPLES, STALENESS = 10, 4, 4, 2
# A random model ends its answers at any token, and so it stays at such a learning rate: lengths from 1 to 120. Four
# answers at a time: the engine is busy nearly always, or none would be under way when weights come.
FLAGS = (
    "--actor-num-gpus-per-node 1 --hf-checkpoint {work}/model --rollout-num-gpus 1 --prompt-data "
    "{work}/data/train.jsonl --input-key prompt --label-key label --apply-chat-template --rm-type random "
    "--num-rollout {rounds} --rollout-batch-size {groups} --n-samples-per-prompt {samples} "
    "--rollout-max-response-len 120 --use-dynamic-batch-size --max-tokens-per-gpu 2048 --advantage-estimator grpo "
    "--use-tis --lr 1e-6 --lr-decay-style constant --attention-dropout 0 --hidden-dropout 0 "
    "--sglang-max-running-requests 4 --sglang-server-concurrency 24 --samples-per-rollout-logged 16 "
    "--eval-interval 3 --eval-prompt-data held_out {work}/data/held_out.jsonl --eval-max-response-len 8 "
    "--fully-async --max-weight-staleness {staleness} --save {folder}/ckpt --load {folder}/ckpt "
    "--save-interval 2 --no-live-view"
)


AT_ONCE = ("--colocate", "--no-offload-train", "--no-offload-rollout", "--num-rollout", "4")


def make_run(work: Work, name: str, *more: str) -> TrainingRun:
    flags = FLAGS.format(
        work=work.path, folder=work.path / name, rounds=ROUNDS, groups=GROUPS, samples=SAMPLES,
        staleness=STALENESS,
    )  # fmt: skip
    return TrainingRun(work.path / name, [*flags.split(), *more], script="train_async.py")


@pytest.fixture(scope="module")
def run(work: Work) -> TrainingRun:
    made = make_run(work, "fully_async")
    made.finish()
    return made


def rollouts(run: TrainingRun) -> list[dict[str, Any]]:
    line = lineage(read_events(run.folder / "ledger.jsonl"))
    return [line.rollouts[number][0] for number in sorted(line.rollouts)]


def check_books(run: TrainingRun) -> None:
    """Every round is whole, no sample is older than allowed, none lost, doubled or trained twice."""
    events = rollouts(run)
    assert len(events) == ROUNDS
    for number, event in enumerate(events):
        samples = event["samples"]
        assert len(samples["index"]) == GROUPS * SAMPLES
        assert all(0 <= number + 1 - version <= STALENESS for version in samples["version"])
    audit = run.audit()
    assert audit.is_clean, audit.problems
    # The last round leaves nothing behind.
    assert events[-1]["returned"] == []
    assert len({index for event in events for index in event["samples"]["index"]}) == (
        ROUNDS * GROUPS * SAMPLES
    )


def test_the_run_comes_to_its_end_with_clean_books(run: TrainingRun) -> None:
    check_books(run)
    rows = read_metrics(run.folder / "metrics.jsonl")
    assert len([row for row in rows if "eval/held_out" in row]) == 5
    staleness = [row["rollout/staleness/max"] for row in rows if "rollout/staleness/max" in row]
    assert len(staleness) == ROUNDS
    assert max(staleness) >= 1
    for row in rows:
        if "rollout/staleness/mean" in row:
            shares = [v for k, v in row.items() if k.removeprefix("rollout/staleness/").isdigit()]
            assert sum(shares) == pytest.approx(1.0)
    diffs = [row["train/train_rollout_logprob_abs_diff"] for row in rows
             if "train/train_rollout_logprob_abs_diff" in row]  # fmt: skip
    assert len(diffs) == ROUNDS


def test_rounds_overlap(run: TrainingRun) -> None:
    """Groups of later rounds were begun before earlier ones were trained."""
    waiting = [event["returned"] for event in rollouts(run)]
    assert any(waiting)
    mixed = 0
    for number in range(ROUNDS):
        text = (run.folder / "samples" / f"{number}.jsonl").read_text()
        for row in map(json.loads, text.splitlines()):
            versions = [int(version) for _, version in row["version_spans"]]
            assert versions == sorted(versions)
            mixed += len(versions) > 1
    assert mixed, "no answer went on under new weights"


def test_both_sides_work_at_once_on_the_same_slot(work: Work) -> None:
    run = make_run(work, "fully_async_at_once", *AT_ONCE)
    run.finish()
    audit = run.audit()
    assert audit.is_clean, audit.problems
    assert len(rollouts(run)) == 4
    rows = read_metrics(run.folder / "metrics.jsonl")
    assert max(row.get("rollout/staleness/max", 0) for row in rows) >= 1


def test_killed_and_started_again_the_books_stay_clean(work: Work) -> None:
    run = make_run(work, "fully_async_killed")
    for role in ("driver", "rollout manager"):
        run.start()
        run.await_checkpoint(beyond=run.checkpoint())
        run.kill(role)
    run.finish()
    check_books(run)
    assert run.audit().counts["attempts"] == 3
    log = (run.folder / "logs" / "rollout-manager.log").read_text()
    assert "groups go on that were unfinished" in log
