"""train_async.py with weights that come in the middle of a round."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from support.train_runs import Run

pytestmark = pytest.mark.runs

# One answer at a time, and long ones: a round takes ten times as long as a training step.
FLAGS = (
    "--hf-checkpoint {work}/model --rollout-num-gpus 1 --prompt-data {work}/data/train.jsonl --input-key prompt "
    "--label-key label --apply-chat-template --rm-type random --num-rollout 4 --rollout-batch-size 16 "
    "--n-samples-per-prompt 4 --global-batch-size 64 --rollout-max-response-len 100 --use-dynamic-batch-size "
    "--max-tokens-per-gpu 1024 --advantage-estimator grpo --lr 1e-3 --lr-decay-style constant "
    "--attention-dropout 0 --hidden-dropout 0 --sglang-max-running-requests 1 --samples-per-rollout-logged 64 "
    "--eval-interval 1 --eval-prompt-data held_out {work}/data/held_out.jsonl --eval-max-response-len 8 "
    "--update-weights-in-flight --update-weight-pause-mode abort "
)


@pytest.fixture(scope="module")
def run(train: Callable[..., Run]) -> Run:
    return train("in_flight", FLAGS, script="train_async.py")


def rows(run: Run, rollout_id: int) -> list[dict[str, Any]]:
    text = (run.folder / "samples" / f"{rollout_id}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_run_comes_to_its_end(run: Run) -> None:
    assert run.code == 0, run.output[-3000:]
    assert run.series("rollout/step") == [0, 1, 2, 3]
    # Evaluations wait for the round beside them: each is by one policy.
    assert len(run.series("eval/held_out")) == 5
    assert not run.series("eval/held_out/mixed_versions_ratio")


def test_rounds_are_written_by_the_weights_before_and_after_a_sync(run: Run) -> None:
    assert {row["weight_versions"][-1] for row in rows(run, 0)} == {"1"}
    num_met, num_mixed = 0, 0
    for rollout_id in (1, 2, 3):
        spans = [row["version_spans"] for row in rows(run, rollout_id)]
        old, new = str(rollout_id), str(rollout_id + 1)
        # A machine that halts the trainer for seconds may bring the weights after the round.
        versions = {version for row in spans for _, version in row}
        assert versions in ({old}, {old, new})
        num_met += len(versions) == 2
        # At most one answer ran when the weights came, and went on; they may come between two.
        mixed = [[version for _, version in row] for row in spans if len(row) > 1]
        assert mixed in ([], [[old, new]])
        num_mixed += len(mixed)
    assert num_met >= 2
    assert num_mixed
    assert len(run.series("rollout/mixed_versions_ratio")) == 3


def test_no_round_lost_an_answer(run: Run) -> None:
    assert run.series("rollout/aborted_groups") == [0, 0, 0, 0]
    # The one that ran, and those of its group and others that waited behind it.
    assert sorted(run.series("rollout/continued_answers"))[-2] >= 1


def test_the_ledger_names_the_oldest_weights_of_each_sample(run: Run) -> None:
    entries = [json.loads(line) for line in (run.folder / "ledger.jsonl").read_text().splitlines()]
    by_round = {e["rollout_id"]: e["samples"] for e in entries if "samples" in e}
    for rollout_id in (1, 2, 3):
        oldest = by_round[rollout_id]["version"]
        expected = [min(int(v) for _, v in row["version_spans"]) for row in rows(run, rollout_id)]
        assert sorted(oldest) == sorted(expected)
