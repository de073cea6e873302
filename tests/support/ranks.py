"""Start the ranks of `parallel_cases.py` and modules like it, and what they left."""

import contextlib
import fcntl
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from support import parallel_cases as cases
from support.device import DEVICE, worker_environment
from support.megatron_runs import free_port, make_tiny_qwen3
from support.tiny_families import make_tiny_family

TIMEOUT_S = float(os.environ.get("SLIME_TEST_RANKS_TIMEOUT_S", 400.0))
LAST_WORDS_S = 20.0
STACKS_S = 2.0
# Of every rank; none of them starts a thread.
IMPORTS = ("slime.backends.megatron.trainer", "transformers.masking_utils")


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
    folder: Path, world_size: int, names: Iterable[str], module: str = cases.__name__
) -> None:
    """The named cases by so many ranks; a failure is reported by the case's own test."""
    run_module(module, world_size, [str(folder), *names], folder)


def run_module(module: str, world_size: int, words: Sequence[str], logs: Path) -> list[int | None]:
    """How the ranks of a module ended, whose `main` reads RANK WORLD_SIZE PORT and `words` from the command line.

    Ranks that still run at the deadline leave the stacks of their threads in their log.
    """
    port, context = str(free_port()), _context()
    with one_group_at_a_time(), mock.patch.dict(os.environ, worker_environment()):
        ranks: list[BaseProcess] = []
        try:
            for rank in range(world_size):
                argv = [module, str(rank), str(world_size), port, *words]
                log = logs / f"rank-{rank}-of-{world_size}.log"
                process = context.Process(target=_run, args=(argv, log))
                process.start()
                ranks.append(process)
            _wait_for_all(ranks)
        finally:
            _end(ranks)
        return [rank.exitcode for rank in ranks]


def _context() -> Any:
    """Of processes forked from one that has imported what all need, 7 s of a core for each rank.

    With cards each imports for itself: a process that has looked for them is not to be forked.
    """
    if DEVICE == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *IMPORTS])
    return context


def _run(argv: list[str], log: Path) -> None:
    """The body of a rank: `main` of its module, with these words."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = argv
    importlib.import_module(argv[0]).main()


def _end(ranks: list[BaseProcess]) -> None:
    late = [rank.pid for rank in ranks if rank.is_alive() and rank.pid]
    for pid in late:
        os.kill(pid, signal.SIGUSR1)  # faulthandler writes its stacks, see `main` of the cases
    if late:
        time.sleep(STACKS_S)
    for rank in ranks:
        rank.kill()
        rank.join()


def _wait_for_all(ranks: list[BaseProcess]) -> None:
    """Until all ended; when one failed, a few seconds more for the others' last words."""
    deadline = time.monotonic() + TIMEOUT_S
    running, has_failed = list(ranks), False
    while running and time.monotonic() < deadline:
        running[0].join(timeout=0.2)
        if not has_failed and any(rank.exitcode for rank in ranks):
            has_failed = True
            deadline = min(deadline, time.monotonic() + LAST_WORDS_S)
        running = [rank for rank in running if rank.is_alive()]


def result(folder: Path, name: str) -> dict[str, Any]:
    """What rank 0 left of a case."""
    errors = sorted(folder.glob("*.error"))
    path = folder / f"{name}.pt"
    said = "\n".join(f"{p.name}:\n{p.read_text()}" for p in errors)
    assert path.exists(), said or last_words(folder)
    return torch.load(path, weights_only=False)


def last_words(folder: Path) -> str:
    """The ends of what the ranks said, their stacks if they stood still."""
    ends = [
        f"{path.name}:\n{path.read_text()[-4000:]}" for path in sorted(folder.glob("rank-*.log"))
    ]
    return "\n".join(["no result", *ends])
