"""The quickstart's tiny model and task, and a way to run train.py as a user does."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.train_runs import MODEL_ARGS, QUICKSTART, ROOT, RUN_TIMEOUT_S, Run, Work


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A tiny random model and a little data, made by the quickstart's own scripts."""
    path = tmp_path_factory.mktemp("work")
    sizes = ["--num-demos", "128", "--num-prompts", "96", "--num-held-out", "16"]
    for command in (
        ["middle_letter.py", str(path / "data"), *sizes],
        ["make_model.py", str(path / "model")],
    ):
        subprocess.run([sys.executable, str(QUICKSTART / command[0]), *command[1:]], check=True)
    return Work(path)


@pytest.fixture(scope="session")
def train(work: Work) -> Callable[..., Run]:
    """Run train.py (or another script) with the model's flags and more; the finished run.

    `paths` come before all others on PYTHONPATH.
    """

    def run(name: str, flags: str, script: str = "train.py", paths: Sequence[Path] = ()) -> Run:
        folder = work.path / name
        argv = [
            *MODEL_ARGS,
            "--device",
            "cpu",
            "--actor-num-gpus-per-node",
            "1",
            "--run-dir",
            str(folder),
        ]
        argv += flags.format(work=work.path).split()
        # Servers are processes of their own: they, too, are to run the code beside these tests.
        python_path = os.pathsep.join(map(str, (*paths, QUICKSTART, ROOT)))
        env = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
        env.pop("RAY_ADDRESS", None)
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *argv],
            env=env,
            cwd=work.path,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
        )
        return Run(folder, done.returncode, done.stdout + done.stderr)

    return run
