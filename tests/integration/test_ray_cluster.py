"""train.py on a Ray cluster that is there already, and as a Ray job, as cluster users start it."""

import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.train_runs import MODEL_ARGS, QUICKSTART, ROOT, Work

from slime.engines.ports import hold_port
from slime.observability.trackers import read_metrics

pytestmark = pytest.mark.cluster
BIN = Path(sys.executable).parent
TIMEOUT_S = 480


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node of our own; environment that leads to it."""
    folder = tmp_path_factory.mktemp("ray")
    port, dashboard, agent = hold_port(), hold_port(), hold_port()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(folder)}
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    env |= {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_MODE": "token"}
    command = f"""start --head --block --num-cpus 2 --node-ip-address 127.0.0.1 --port {port}
        --dashboard-host 127.0.0.1 --dashboard-port {dashboard} --disable-usage-stats
        --dashboard-agent-listen-port {agent}
        --temp-dir {folder}/r --object-store-memory 300000000"""
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [str(BIN / "ray"), *shlex.split(command)],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + TIMEOUT_S
    while not _answers(url):
        assert head.poll() is None, (folder / "head.log").read_text()
        assert time.monotonic() < deadline, (folder / "head.log").read_text()
        time.sleep(0.5)
    yield env | {"RAY_ADDRESS": f"127.0.0.1:{port}", "JOB_URL": url}
    os.killpg(head.pid, signal.SIGTERM)
    try:
        head.wait(60)
    finally:
        if head.poll() is None:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait(10)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url + "/api/version", timeout=2).close()
    except urllib.error.HTTPError:
        return True  # it wants a token
    except OSError:
        return False
    return True


def command(work: Work, folder: Path) -> list[str]:
    """One round of GRPO."""
    flags = f"""--device cpu --actor-num-gpus-per-node 1 --rollout-num-gpus 1 --run-dir {folder}
        --hf-checkpoint {work.path}/model --prompt-data {work.path}/data/train.jsonl
        --input-key prompt --label-key label --apply-chat-template
        --custom-rm-path middle_letter.reward --num-rollout 1 --rollout-batch-size 4
        --n-samples-per-prompt 2 --global-batch-size 8 --rollout-max-response-len 4 --lr 1e-4
        --attention-dropout 0 --hidden-dropout 0"""
    return [sys.executable, str(ROOT / "train.py"), *MODEL_ARGS, *shlex.split(flags)]


def test_a_running_cluster_is_joined(cluster: dict[str, str], work: Work) -> None:
    folder = work.path / "joined"
    env = cluster | {"PYTHONPATH": str(QUICKSTART)}
    done = subprocess.run(
        command(work, folder), env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "joined the Ray cluster at" in done.stdout + done.stderr
    assert read_metrics(folder / "metrics.jsonl")


def test_a_ray_job_runs_to_its_end(cluster: dict[str, str], work: Work) -> None:
    folder = work.path / "job"
    runtime_env = json.dumps({"env_vars": {"PYTHONPATH": str(QUICKSTART)}})
    submit = [str(BIN / "ray"), "job", "submit", f"--address={cluster['JOB_URL']}"]
    submit += [f"--runtime-env-json={runtime_env}", "--", *command(work, folder)]
    done = subprocess.run(submit, env=cluster, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_metrics(folder / "metrics.jsonl")


# --- the scripts in scripts/, which find or start Ray themselves ---


def start_recipe(work: Work, folder: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    """The SFT recipe with the quickstart's model, one rank and a few rounds."""
    inputs = {"MODEL_DIR": "model", "TRAIN_DATA": "data/demos.jsonl", "SAVE_DIR": str(folder)}
    flags = """--device cpu --loss-mask-type qwen --num-rollout 2 --rollout-batch-size 16
        --global-batch-size 16"""
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts/run-qwen3-4B-base-sft.sh"), *shlex.split(flags), *MODEL_ARGS],
        env=env | inputs | {"PYTHON": sys.executable, "GPUS_PER_NODE": "1"},
        cwd=work.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_recipe_starts_a_ray_that_ends_with_it(work: Work, tmp_path: Path) -> None:
    # No cluster is noted there; not tmp_path, as paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        process = start_recipe(work, tmp_path / "run folder", {**os.environ, "RAY_TMPDIR": folder})
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    assert read_metrics(tmp_path / "run folder/run/metrics.jsonl")
    head = output.partition("for this run (process ")[2].partition(")")[0]
    # The head led a session of its own, so that all it started has its number.
    listed = subprocess.run(["ps", "-s", head, "-o", "stat="], capture_output=True, text=True)
    assert [state for state in listed.stdout.split() if not state.startswith("Z")] == []


def test_a_recipe_leaves_a_cluster_it_joined_alone(
    cluster: dict[str, str], work: Work, tmp_path: Path
) -> None:
    process = start_recipe(work, tmp_path / "save", cluster)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    assert f"using the Ray cluster at {cluster['RAY_ADDRESS']}" in output
    assert read_metrics(tmp_path / "save/run/metrics.jsonl")
    assert _answers(cluster["JOB_URL"])
