"""Every command of docs/debug.md runs, in its order, on the quickstart's tiny model."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.train_runs import MODEL_ARGS, QUICKSTART, ROOT, RUN_TIMEOUT_S, Work

pytestmark = pytest.mark.runs

FLAGS = (
    "--device cpu --actor-num-gpus-per-node 1 --hf-checkpoint {work}/model --rollout-num-gpus 1 "
    "--prompt-data {work}/data/train.jsonl --input-key prompt --label-key label "
    "--apply-chat-template --custom-rm-path middle_letter.reward --rollout-batch-size 4 "
    "--n-samples-per-prompt 2 --global-batch-size 8 --rollout-max-response-len 8 "
    "--use-dynamic-batch-size --max-tokens-per-gpu 256 --advantage-estimator grpo --num-rollout 2 "
    "--lr 1e-3 --lr-decay-style constant --attention-dropout 0 --hidden-dropout 0"
)


def test_every_command_of_the_page_runs(work: Work, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "debug.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    args = [*MODEL_ARGS, *FLAGS.format(work=work.path).split()]
    for name in ("train.py", "train_async.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = "\n".join(["set -euo pipefail", f"ARGS=({shlex.join(args)})", *blocks])
    folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = f"{QUICKSTART}:{ROOT}"
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True,
        timeout=RUN_TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "clean: no sample was lost" in done.stdout
    rows = (tmp_path / "runs/only-train/metrics.jsonl").read_text().splitlines()
    assert sum("train/step" in json.loads(row) for row in rows) == 2
    assert (tmp_path / "runs/only-train/report.html").stat().st_size > 10_000
