"""One of several data-parallel ranks: all cases of test_trainer_dp.py in one process.

Its words are RANK WORLD_SIZE PORT MODEL FOLDER (see ranks.py); rank 0 leaves what it saw in FOLDER.
"""

import faulthandler
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.megatron_runs import (
    policy_gradient_loss,
    random_batch,
    rank_batch,
    start_trainer,
    train_step,
    trainer_config,
    weights_of,
)

from slime.training.interface import ModelTag, TrainStep

VOCAB = 106
SAVED_AFTER = 2


def whole_batch(seed: int) -> Any:
    """The samples of one step, over all ranks."""
    return random_batch(num_samples=8, vocab_size=VOCAB, seed=seed)


def run_cases(rank: int, world_size: int, port: int, model: str, folder: Path) -> None:
    """Plain, overlapped and resumed training; each case a file."""

    def start(*words: str) -> Any:
        config = trainer_config(model, "--actor-num-gpus-per-node", str(world_size), *words)
        return start_trainer(config, rank=rank, world_size=world_size, port=port)

    def step(seed: int) -> TrainStep:
        return train_step(rank_batch(whole_batch(seed), rank, world_size))

    def record(name: str, metrics: list[dict[str, float]], trainer: Any) -> None:
        content = {
            "metrics": metrics,
            "weights": weights_of(trainer),
            "log_probs": trainer.log_probs(step(9).batch, ModelTag.ACTOR),
            "all_metrics": [None] * world_size,
        }
        dist.all_gather_object(content["all_metrics"], metrics)
        if rank == 0:
            torch.save(content, folder / f"{name}.pt")

    save = ("--save", str(folder / "checkpoint"), "--save-interval", "1")
    plain = start(*save)
    plain.load()
    metrics: list[dict[str, float]] = []
    for seed in (1, 2, 3):
        metrics.append(plain.train_step(step(seed), policy_gradient_loss))
        if seed == SAVED_AFTER:
            plain.save(seed)
    record("plain", metrics, plain)

    overlapped = start("--overlap-grad-reduce", "--overlap-param-gather")
    overlapped.load()
    metrics = [overlapped.train_step(step(seed), policy_gradient_loss) for seed in (1, 2, 3)]
    record("overlapped", metrics, overlapped)

    resumed = start("--load", str(folder / "checkpoint"))
    assert resumed.load() == SAVED_AFTER + 1
    record("resumed", [resumed.train_step(step(3), policy_gradient_loss)], resumed)

    total = resumed.sum_over_dp(torch.tensor([1.0, float(rank)]))
    assert total.tolist() == [world_size, sum(range(world_size))]
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """All cases, by this rank."""
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    rank, world_size, port = map(int, sys.argv[1:4])
    run_cases(rank, world_size, port, sys.argv[4], Path(sys.argv[5]))
