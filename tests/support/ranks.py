"""Start the ranks of `parallel_cases.py`, and what they left."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import torch
from support import parallel_cases as cases
from support.device import DEVICE, worker_environment
from support.megatron_runs import free_port, make_tiny_qwen3
from support.tiny_families import make_tiny_family

TIMEOUT_S = float(os.environ.get("SLIME_TEST_RANKS_TIMEOUT_S", 400.0))
LAST_WORDS_S = 20.0
STACKS_S = 2.0


def make_models(folder: Path, names: Iterable[str]) -> None:
    """The random models of the cases, each in a folder of its name."""
    for name in sorted(set(names)):
        if name.startswith("qwen3") and name != "qwen3_moe":
            make_tiny_qwen3(
                folder / name,
                vocab_size=cases.VOCAB,
                tied=name == "qwen3",
                num_hidden_layers=4,
            )
        else:
            make_tiny_family(folder / name, name, vocab_size=cases.VOCAB)


@contextlib.contextmanager
def one_group_at_a_time() -> Generator[None]:
    """Wait until no other test of this user runs ranks: more ranks than cores wait for each other.

    Machines with cards have more cores than cards.
    """
    if DEVICE == "cuda":
        yield
        return
    path = Path(tempfile.gettempdir()) / f"slime-test-ranks-{os.getuid()}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_ranks(
    folder: Path, world_size: int, names: Iterable[str], script: str = cases.__file__
) -> None:
    """The named cases by so many ranks; a failure is reported by the case's own test.

    Ranks that still run at the deadline leave the stacks of their threads in FOLDER.
    """
    port = str(free_port())
    with one_group_at_a_time(), contextlib.ExitStack() as files:
        ranks = [
            subprocess.Popen(
                [sys.executable, script, str(rank), str(world_size), port, str(folder), *names],
                env=worker_environment(),
                stdout=subprocess.DEVNULL,
                stderr=files.enter_context(_log(folder, world_size, rank).open("w")),
            )
            for rank in range(world_size)
        ]
        try:
            _wait_for_all(ranks)
        finally:
            _end(ranks)


def _log(folder: Path, world_size: int, rank: int) -> Path:
    return folder / f"rank-{rank}-of-{world_size}.log"


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    late = [rank for rank in ranks if rank.poll() is None]
    for rank in late:
        rank.send_signal(signal.SIGUSR1)  # faulthandler writes its stacks, see `main` of the cases
    if late:
        time.sleep(STACKS_S)
    for rank in ranks:
        rank.kill()
        rank.wait()


def _wait_for_all(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Until all ended; when one failed, a few seconds more for the others' last words."""
    deadline = time.monotonic() + TIMEOUT_S
    running, has_failed = list(ranks), False
    while running and time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0].wait(timeout=0.2)
        if not has_failed and any(rank.poll() for rank in ranks):
            has_failed = True
            deadline = min(deadline, time.monotonic() + LAST_WORDS_S)
        running = [rank for rank in running if rank.poll() is None]


def result(folder: Path, name: str) -> dict[str, Any]:
    """What rank 0 left of a case."""
    errors = sorted(folder.glob("*.error"))
    path = folder / f"{name}.pt"
    assert path.exists(), "\n".join(f"{p.name}:\n{p.read_text()}" for p in errors) or _logs(folder)
    return torch.load(path, weights_only=False)


def _logs(folder: Path) -> str:
    """The ends of what the ranks said, their stacks if they stood still."""
    ends = [
        f"{path.name}:\n{path.read_text()[-4000:]}" for path in sorted(folder.glob("rank-*.log"))
    ]
    return "\n".join(["no result", *ends])
