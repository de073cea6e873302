"""examples/agent on two CPU cores: its data, its model, its agent, two rounds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.train_runs import QUICKSTART, ROOT, Run

from slime.cli.main import main

pytestmark = pytest.mark.runs

EXAMPLE = ROOT / "examples" / "agent"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and a little data, by the example's own scripts."""
    folder = tmp_path_factory.mktemp("agent")
    sizes = ["--num-demos", "16", "--num-prompts", "16", "--num-held-out", "8"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (EXAMPLE, QUICKSTART, ROOT)))}
    for command in (
        ["agent_data.py", str(folder / "data"), *sizes],
        ["agent_model.py", str(folder / "model")],
    ):
        program = [sys.executable, str(EXAMPLE / command[0]), *command[1:]]
        subprocess.run(program, check=True, env=env)
    return folder


def test_an_agent_library_trains_through_its_api(train: Callable[..., Run], made: Path) -> None:
    config = json.loads((made / "model" / "config.json").read_text())
    run = train(
        "agent_example",
        f"--hf-checkpoint {made}/model --vocab-size {config['vocab_size']} --rollout-num-gpus 1 "
        f"--prompt-data {made}/data/train.jsonl --input-key prompt --label-key label "
        "--num-rollout 2 --rollout-batch-size 4 --n-samples-per-prompt 2 --global-batch-size 8 "
        "--rollout-max-response-len 60 --rollout-max-context-len 256 --generate-timeout-s 60 "
        "--use-dynamic-batch-size --max-tokens-per-gpu 2048 --lr 1e-3 --lr-decay-style constant "
        "--attention-dropout 0 --hidden-dropout 0 --agent-function-path agent.run_agent "
        f"--eval-interval 2 --eval-prompt-data held_out {made}/data/held_out.jsonl "
        "--save-debug-rollout-data {work}/agent-{{rollout_id}}.jsonl",
        paths=[ROOT, EXAMPLE, *map(Path, os.environ.get("PYTHONPATH", "").split(os.pathsep))],
    )
    assert run.code == 0, run.output[-3000:]
    assert max(run.series("train/train_rollout_logprob_abs_diff")) < 1e-4
    assert min(run.series("rollout/usage/requests/mean")) >= 1
    assert len(run.series("eval/held_out")) == 2
    lines = (run.folder.parent / "agent-1.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "tokens" in row]
    assert len({row["rollout_id"] or row["index"] for row in rows}) == 8
    assert all(row["status"] in ("completed", "truncated") for row in rows)
    assert main(["ledger", str(run.folder)]) == 0
