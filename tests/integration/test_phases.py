"""Where a round's time goes: everything is accounted for, and a known delay shows in its phase."""

from collections.abc import Callable

import pytest
from support.slow_phases import (
    ADVANTAGE_S,
    DATA_S,
    FLAGS,
    GENERATE_S,
    LOG_PROBS_S,
    REWARD_S,
    SAVE_S,
    SYNC_S,
    TRAIN_S,
)
from support.train_runs import ROOT, Run, assert_side_adds_up, phases_of

from slime.observability.trackers import read_metrics

pytestmark = pytest.mark.runs

GRPO = (
    "--hf-checkpoint {work}/model --rollout-num-gpus 1 --prompt-data {work}/data/train.jsonl --input-key prompt "
    "--label-key label --apply-chat-template --rollout-batch-size 4 --n-samples-per-prompt 4 --global-batch-size 16 "
    "--rollout-max-response-len 4 --use-dynamic-batch-size --max-tokens-per-gpu 512 --advantage-estimator grpo "
    "--lr 1e-3 --attention-dropout 0 --hidden-dropout 0 --num-rollout 2 --save {work}/slow --save-interval 1 "
    "--eval-interval 1 --eval-prompt-data held_out {work}/data/held_out.jsonl --eval-max-response-len 4 "
)
# A phase has work of its own, too, on a busy machine; what went elsewhere is missing from its lower bound.
SLACK_S = 1.5

EVAL_S = GENERATE_S + REWARD_S
EXPECTED = {
    "round": {
        "data": DATA_S + ADVANTAGE_S,
        "generate": GENERATE_S,
        "reward": REWARD_S,
        "log_probs": LOG_PROBS_S,
        "train": TRAIN_S,
        "sync": SYNC_S,
        "save": SAVE_S,
        "eval": EVAL_S,
        "idle": 0.0,
    },
    "trainer": {
        "data": ADVANTAGE_S,
        "log_probs": LOG_PROBS_S,
        "train": TRAIN_S,
        "sync": SYNC_S,
        "save": 0.0,
        "idle": DATA_S + GENERATE_S + REWARD_S + SAVE_S + EVAL_S,
    },
    "engines": {
        "data": DATA_S,
        "generate": GENERATE_S,
        "reward": REWARD_S,
        "sync": SYNC_S,
        "save": SAVE_S,
        "eval": EVAL_S,
        "idle": ADVANTAGE_S + LOG_PROBS_S + TRAIN_S,
    },
}


@pytest.fixture(scope="module")
def slow(train: Callable[..., Run]) -> Run:
    run = train("slow", GRPO + FLAGS, paths=(ROOT / "tests",))
    assert run.code == 0, run.output[-3000:]
    return run


@pytest.mark.parametrize("side", EXPECTED)
def test_a_known_delay_shows_in_its_phase_and_in_no_other(slow: Run, side: str) -> None:
    # The second round: an evaluation and a checkpoint came before it.
    found = phases_of(slow, side)[1]
    assert set(found) == set(EXPECTED[side])
    for phase, seconds in EXPECTED[side].items():
        assert found[phase] >= seconds - 0.01, (phase, found)
        assert phase == "idle" or found[phase] <= seconds + SLACK_S, (phase, found)


def test_phases_add_up_to_the_time_between_two_rows(slow: Run) -> None:
    first, second = (
        row for row in read_metrics(slow.folder / "metrics.jsonl") if "rollout/step" in row
    )
    wall = second["time"] - first["time"]
    assert second["perf/round_time"] == pytest.approx(wall, rel=0.01)
    assert sum(phases_of(slow, "round")[1].values()) == pytest.approx(wall, rel=0.01)
    for side in ("trainer", "engines"):
        assert_side_adds_up(slow, side, 1)


def test_a_step_is_the_round_without_its_evaluation(slow: Run) -> None:
    evaluation = phases_of(slow, "round")[1]["eval"]
    whole = slow.series("perf/round_time")[1]
    assert slow.series("perf/step_time")[1] == pytest.approx(whole - evaluation)


def test_the_end_of_the_run_says_where_its_time_went(slow: Run) -> None:
    line = next(line for line in slow.output.splitlines() if "s of rounds:" in line)
    shares = [
        float(word) for word in line.replace("%", "").split() if word.replace(".", "").isdigit()
    ]
    assert sum(shares[1:]) == pytest.approx(
        100.0, abs=0.6
    )  # after the seconds; rounded to 0.1 each
