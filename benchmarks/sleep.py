"""What a sleeping trainer leaves on its cards, and how long it takes to go and to come back.

    python benchmarks/sleep.py [--model qwen3-4b] [--gpus 1] [--words "..."]

Random weights, one optimizer step, then `sleep()` and `wake_up()` three times, with a step between
them. Prints JSON. Memory is the driver's: all that this process holds on the card, with CUDA's own
context, the kernels loaded and NCCL's buffers; `context_gib` is what torch alone holds before there
is a model, `torch_asleep_gib` what its tensors and its allocator hold of the rest.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from shapes import model_config
from train_step import build, columns_of, run_all_ranks, trainer_parser

GIB = 2**30


def used() -> float:
    """GiB of this card that are in use."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def digest(trainer: Any) -> int:
    """Sum of all bits of weights and of Adam's numbers, as integers."""
    from slime.backends.megatron.optimizer.distributed import torch_optimizers

    tensors = [p.data for chunk in trainer._bare for p in chunk.parameters()]
    for optimizer in torch_optimizers(trainer._optimizer):
        for state in optimizer.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
    words = {2: torch.int16, 4: torch.int32}
    return sum(int(t.view(words[t.element_size()]).sum(dtype=torch.int64)) for t in tensors)


def run_rank(options: argparse.Namespace, rank: int) -> None:
    """All rounds of one rank; rank 0 prints."""
    torch.cuda.set_device(rank)
    before = used()
    torch.zeros(1, device="cuda")
    context = used() - before
    from slime.training.interface import TrainStep
    from slime.training.losses import make_loss_fn

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(model_config(options.model, options.layers)))
    trainer, batch, config = build(options, rank, folder)
    step = TrainStep(
        batch=batch, plan=batch.steps[0], columns=columns_of(batch), needs_entropy=True
    )
    loss_fn = make_loss_fn(config)
    rounds: list[dict[str, Any]] = []
    for _ in range(3):
        trainer.train_step(step, loss_fn)
        torch.cuda.synchronize()
        bits, awake, start = digest(trainer), used() - before, time.monotonic()
        trainer.sleep()
        torch.cuda.synchronize()
        slept, asleep = time.monotonic(), used() - before
        tensors, kept = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        trainer.wake_up()
        torch.cuda.synchronize()
        rounds.append(
            {
                "awake_gib": round(awake, 2),
                "asleep_gib": round(asleep, 2),
                "torch_asleep_gib": [round(tensors / GIB, 3), round(kept / GIB, 3)],
                "sleep_s": round(slept - start, 3),
                "wake_s": round(time.monotonic() - slept, 3),
                "same_bits": digest(trainer) == bits,
            }
        )
    if rank == 0:
        report = {
            "model": options.model,
            "gpus": options.gpus,
            "words": options.words,
            "gpu": torch.cuda.get_device_name(),
            "context_gib": round(context, 2),
            "rounds": rounds,
        }
        sys.stdout.write(json.dumps(report) + "\n")


def main() -> None:
    parser = trainer_parser(__doc__.split("\n", 1)[0])
    parser.set_defaults(samples=4)
    options = parser.parse_args()
    if options.rank is None:
        sys.exit(run_all_ranks(__file__, options))
    run_rank(options, options.rank)


if __name__ == "__main__":
    main()
