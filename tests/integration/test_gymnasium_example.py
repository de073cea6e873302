"""examples/gymnasium on two CPU cores: its data, its settings, a few rounds of real episodes on real engines."""

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

EXAMPLE = ROOT / "examples" / "gymnasium"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little data and the settings, by the example's own script."""
    folder = tmp_path_factory.mktemp("lake")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (EXAMPLE, QUICKSTART, ROOT)))}
    program = [sys.executable, str(EXAMPLE / "lake.py"), str(folder), "--num-demos", "16"]
    subprocess.run(program, check=True, env=env)
    code = "import json, lake; print(json.dumps({'environment_args': lake.SETTINGS}))"
    told = subprocess.run(
        [sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True
    )
    # invalid: "tell", as the untrained model writes no actions, and episodes would be one turn.
    settings = json.loads(told.stdout)
    settings["environment_args"] |= {"invalid": "tell", "invalid_reward": -0.1}
    (folder / "lake.yaml").write_text(json.dumps(settings))
    return folder


def test_episodes_train_on_what_the_model_wrote(train: Callable[..., Run], made: Path) -> None:
    run = train(
        "gymnasium_example",
        f"--hf-checkpoint {{work}}/model --rollout-num-gpus 1 --prompt-data {made}/train.jsonl "
        "--input-key prompt --num-rollout 2 --rollout-batch-size 4 --n-samples-per-prompt 2 "
        "--global-batch-size 8 --rollout-max-response-len 100 --rollout-max-context-len 160 "
        "--use-dynamic-batch-size --max-tokens-per-gpu 2048 --lr 1e-3 --lr-decay-style constant "
        "--attention-dropout 0 --hidden-dropout 0 --partial-rollout --over-sampling-batch-size 6 "
        f"--custom-config-path {made}/lake.yaml --environment-max-turns 3 --rollout-stop a e i u d "
        "--environment-path slime.environments.gymnasium_text.GymnasiumText --log-multi-turn "
        f"--eval-interval 2 --eval-prompt-data held_out {made}/held_out.jsonl "
        "--save-debug-rollout-data {work}/lake-{{rollout_id}}.jsonl",
        paths=[ROOT, EXAMPLE, QUICKSTART],
    )
    assert run.code == 0, run.output[-3000:]
    assert max(run.series("train/train_rollout_logprob_abs_diff")) < 1e-4
    assert len(run.series("rollout/environment/invalid_action_ratio")) == 2
    assert len(run.series("eval/held_out/environment/terminated_ratio")) == 2
    lines = (run.folder.parent / "lake-1.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "tokens" in row]
    assert len(rows) == 8
    assert any(len(row["metadata"]["episode"]["actions"]) > 1 for row in rows)
    for row in rows:
        episode = row["metadata"]["episode"]
        assert row["status"] in ("completed", "truncated")
        assert row["reward"] == pytest.approx(sum(episode["rewards"]))
        assert episode["restarts"] == 0
    seeds = {row["group_index"]: row["metadata"]["episode"]["seed"] for row in rows}
    assert len(set(seeds.values())) == 4
    for row in rows:
        assert row["metadata"]["episode"]["seed"] == seeds[row["group_index"]]
    assert main(["ledger", str(run.folder)]) == 0
