"""A run whose servers die or hang in the middle of rounds ends like one whose servers live."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.interrupted_runs import TrainingRun
from support.train_runs import Work

FLAGS = (
    "--actor-num-gpus-per-node 1 --rollout-num-gpus 2 --hf-checkpoint {work}/model "
    "--prompt-data {work}/data/train.jsonl --input-key prompt --label-key label "
    "--apply-chat-template --rollout-shuffle --custom-rm-path support.killing_reward.reward "
    "--num-rollout 4 --rollout-batch-size 8 --n-samples-per-prompt 4 --global-batch-size 32 "
    "--rollout-max-response-len 48 --sglang-server-concurrency 4 --use-dynamic-batch-size "
    "--max-tokens-per-gpu 4096 --advantage-estimator grpo --lr 3e-4 --lr-decay-style constant "
    "--attention-dropout 0 --hidden-dropout 0 --eval-interval 2 --eval-temperature 0 "
    "--eval-prompt-data held_out {work}/data/held_out.jsonl --eval-max-response-len 16 "
    "--use-fault-tolerance --rollout-health-check-interval 1 --rollout-health-check-timeout 4 "
    "--save-debug-rollout-data {folder}-dumps/{{rollout_id}}.jsonl"
)
pytestmark = pytest.mark.trust
RESTARTS = ("rollout/engine_restarts", "rollout/router_restarts")


def finished(
    work: Work, name: str, kills: str, monkeypatch: pytest.MonkeyPatch, script: str = "train.py"
) -> TrainingRun:
    """A run to its end; `kills` as in support/killing_reward.py."""
    folder = work.path / name
    monkeypatch.setenv("SLIME_TEST_KILLS", kills)
    run = TrainingRun(folder, FLAGS.format(work=work.path, folder=folder).split(), script)
    run.finish()
    return run


def dumps(run: TrainingRun) -> dict[str, list[dict[str, Any]]]:
    """The samples of each round and evaluation, without the random key for the router."""
    folder = run.folder.with_name(f"{run.folder.name}-dumps")
    return {path.name: [_sample(line) for line in _lines(path)] for path in folder.iterdir()}


def metrics(run: TrainingRun) -> list[dict[str, Any]]:
    """Every row without times and restarts."""
    return [{k: v for k, v in row.items() if k not in RESTARTS} for row in run.metrics()]


def total(run: TrainingRun, name: str) -> float:
    """Sum of a metric over the run."""
    return sum(row.get(name, 0) for row in run.metrics())


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _sample(line: str) -> dict[str, Any]:
    row = json.loads(line)
    row.pop("session_id", None)
    return row


def test_servers_killed_and_hanging_within_rounds_change_no_bit(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = finished(work, "calm", "", monkeypatch)
    stormy = finished(work, "stormy", "1:engines:KILL 2:router:KILL 3:engine:STOP", monkeypatch)
    assert total(stormy, RESTARTS[0]) == 3  # both of round 1, the one that hung in round 3
    assert total(stormy, RESTARTS[1]) == 1
    assert total(calm, RESTARTS[0]) == 0
    assert len(dumps(calm)) == 7  # four rounds, three evaluations
    assert dumps(stormy) == dumps(calm)
    assert metrics(stormy) == metrics(calm)
