"""A Ray job on two nodes that share no loopback: ranks and engines on both, started as cluster users do.

The nodes are network namespaces of this machine (support/two_nodes.py): what says 127.0.0.1 to a process of
the other node, or listens at the address of the host's name, finds nobody.
"""

import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.engine_server import SGLANG_CPU, SGLANG_STAND_INS
from support.train_runs import MODEL_ARGS, QUICKSTART, ROOT, Run, Work
from support.two_nodes import ADDRESSES, NoNamespaces, TwoNodes, two_nodes

pytestmark = pytest.mark.cluster
RAY = str(Path(sys.executable).parent / "ray")
TIMEOUT_S = 500  # less than the time after which pytest ends a test that hangs
JOBS = f"http://{ADDRESSES[0]}:8265"


class Cluster:
    """`ray start` on both nodes.

    Attributes:
        env: environment of everything that belongs to it.
    """

    def __init__(self, nodes: TwoNodes, folder: Path) -> None:
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.nodes = nodes
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(folder)}
        self.env |= {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_MODE": "token"}
        self.env.pop("RAY_ADDRESS", None)
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """The head on the first node; returns when both are there."""
        head = f"""start --head --port 6379 --temp-dir {self._folder}/r --disable-usage-stats
            --dashboard-host {ADDRESSES[0]} --dashboard-port 8265"""
        self._start(0, head)
        self._until("the head answers", lambda: self._ray("status").returncode == 0)
        self._start(1, f"start --address {ADDRESSES[0]}:6379")
        self._until("both nodes are there", lambda: self._ray("status").stdout.count("node_") >= 2)

    def submit(self, *command: str, paths: Sequence[Path]) -> subprocess.CompletedProcess[str]:
        """`ray job submit` on the first node, to its end; `paths` are its PYTHONPATH."""
        # The second one is slime's too: the job's own wins.
        variables = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        words = ["job", "submit", f"--address={JOBS}"]
        words += [f"--runtime-env-json={json.dumps({'env_vars': variables})}", "--", *command]
        return self._ray(*words)

    def stop(self) -> None:
        """End both nodes."""
        for process in reversed(self._started):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(10)

    def _start(self, node: int, words: str) -> None:
        words += f" --block --num-cpus 1 --object-store-memory 200000000 --node-ip-address {ADDRESSES[node]}"
        with (self._folder / f"node-{node}.log").open("wb") as log:
            command = self.nodes.on(node, RAY, *shlex.split(words))
            self._started.append(
                subprocess.Popen(
                    command, env=self.env, stdout=log, stderr=log, start_new_session=True
                )
            )

    def _ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        env = self.env | {"RAY_ADDRESS": f"{ADDRESSES[0]}:6379"}
        command = self.nodes.on(0, RAY, *words)
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)

    def _until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            logs = "".join(path.read_text() for path in self._folder.glob("node-*.log"))
            assert all(process.poll() is None for process in self._started), logs
            assert time.monotonic() < deadline, f"waiting until {what}: {logs}"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        try:
            nodes = stack.enter_context(two_nodes())
        except NoNamespaces as error:
            pytest.skip(str(error))
        # Not pytest's folder: paths of sockets must be short.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-"))
        cluster = Cluster(nodes, Path(folder))
        stack.callback(cluster.stop)
        cluster.start()
        yield cluster


def train(cluster: Cluster, work: Work, name: str, more: str, *paths: Path) -> Run:
    """Two rounds of GRPO on two ranks, one on each node, and two slots of engines."""
    folder = work.path / name
    flags = f"""--device cpu --actor-num-nodes 2 --actor-num-gpus-per-node 1 --rollout-num-gpus 2
        --run-dir {folder} --hf-checkpoint {work.path}/model --save {folder}-checkpoints
        --prompt-data {work.path}/data/train.jsonl --input-key prompt --label-key label
        --apply-chat-template --custom-rm-path middle_letter.reward --num-rollout 2
        --rollout-batch-size 8 --n-samples-per-prompt 2 --global-batch-size 16
        --rollout-max-response-len 4 --lr 1e-2 --attention-dropout 0 --hidden-dropout 0 {more}"""
    words = [sys.executable, str(ROOT / "train.py"), *MODEL_ARGS, *shlex.split(flags)]
    done = cluster.submit(*words, paths=(*paths, QUICKSTART))
    return Run(folder, done.returncode, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def run(cluster: Cluster, work: Work) -> Run:
    return train(cluster, work, "two-nodes", "")


def test_the_job_runs_to_its_end(run: Run) -> None:
    assert run.code == 0, run.output[-5000:]
    assert len(run.series("train/loss")) == 2


def test_each_node_has_a_rank_and_an_engine(run: Run) -> None:
    devices = re.findall(r"^ +(\S+) +(train rank \d), (engine \d)$", run.output, re.MULTILINE)
    assert sorted(row[0] for row in devices) == list(ADDRESSES)
    assert {row[1] for row in devices} == {"train rank 0", "train rank 1"}
    assert {row[2] for row in devices} == {"engine 0", "engine 1"}


def test_engines_of_both_nodes_have_the_weights_of_both_ranks(run: Run) -> None:
    assert max(run.series("train/train_rollout_logprob_abs_diff")) < 1e-4
    assert len(run.series("perf/update_weights_verify_time")) == 2
    # Each rank wrote its part of the checkpoint of both rounds, where the other one reads it.
    saved = run.folder.parent / "two-nodes-checkpoints"
    assert (saved / "latest_checkpointed_iteration.txt").read_text().strip() == "1"


def test_nothing_of_the_run_listens_at_an_address_of_one_node_only(run: Run) -> None:
    log = (run.folder / "logs" / "rollout-manager.log").read_text()
    (line,) = re.findall(r"router (\S+) in front of 2 engines: (.*)", log)
    hosts = re.findall(r"http://([\d.]+):", " ".join(line))
    assert sorted(set(hosts)) == list(ADDRESSES)


@pytest.mark.skipif(not SGLANG_CPU.is_dir(), reason="make setup-sglang-cpu puts SGLang there")
def test_an_sglang_engine_lies_on_both_nodes(cluster: Cluster, work: Work) -> None:
    """One stock SGLang server with a rank on each node, which rank 0 of the trainer sends weights to."""
    model = work.path / "two-heads"
    make_model = [sys.executable, str(QUICKSTART / "make_model.py"), str(model), "--size", "gpu"]
    subprocess.run(make_model, check=True)
    flags = f"""--rollout-engine sglang --rollout-num-gpus-per-engine 2 --num-gpus-per-node 1
        --hf-checkpoint {model} --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 2
        --kv-channels 64 --sglang-max-total-tokens 4096 --sglang-max-running-requests 16"""
    run = train(cluster, work, "sglang", flags, SGLANG_STAND_INS, SGLANG_CPU)
    assert run.code == 0, run.output[-5000:]
    assert max(run.series("train/train_rollout_logprob_abs_diff")) < 1e-5
    assert len(run.series("perf/update_weights_verify_time")) == 2
    for node, name in enumerate(("engine-0.log", "engine-0-node-1.log")):
        log = (run.folder / "logs" / name).read_text()
        assert f"host='{ADDRESSES[node]}'" in log
        assert f"dist_init_addr='{ADDRESSES[0]}:" in log
