"""examples/multi-agent on two CPU cores: its functions, its settings, two rounds."""

import json
from collections import Counter
from collections.abc import Callable

import pytest
from support.train_runs import ROOT, Run

from slime.cli.main import main

pytestmark = pytest.mark.runs

EXAMPLE = ROOT / "examples" / "multi-agent"


def test_solvers_and_judge_train_together(train: Callable[..., Run]) -> None:
    run = train(
        "agents",
        "--hf-checkpoint {work}/model --rollout-num-gpus 1 --prompt-data {work}/data/train.jsonl "
        "--input-key prompt --label-key label --num-rollout 2 --rollout-batch-size 4 "
        "--n-samples-per-prompt 2 --global-batch-size 8 --rollout-max-response-len 12 "
        "--use-dynamic-batch-size --max-tokens-per-gpu 2048 --lr 1e-3 --lr-decay-style constant "
        "--attention-dropout 0 --hidden-dropout 0 --rollout-max-context-len 64 "
        f"--custom-config-path {EXAMPLE / 'agents.yaml'} "
        "--custom-generate-function-path agents.generate --custom-rm-path agents.reward "
        "--custom-reward-post-process-path agents.by_role --eval-interval 2 "
        "--eval-prompt-data held_out {work}/data/held_out.jsonl --eval-max-response-len 12 "
        "--save-debug-rollout-data {work}/agents-{{rollout_id}}.jsonl",
        paths=[ROOT, EXAMPLE],
    )
    assert run.code == 0, run.output[-3000:]
    assert run.series("train/global_batch_size") == [8, 8]
    assert run.series("rollout/usage/requests/mean") == [4.0, 4.0]
    assert max(run.series("train/train_rollout_logprob_abs_diff")) < 1e-4
    assert len(run.series("eval/held_out")) == 2
    lines = (run.folder.parent / "agents-1.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "tokens" in row]
    assert Counter(row["metadata"]["role"] for row in rows) == {"solver": 24, "judge": 8}
    assert set(Counter(row["rollout_id"] for row in rows).values()) == {4}
    assert main(["ledger", str(run.folder)]) == 0
