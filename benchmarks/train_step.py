"""Whole optimizer steps of the Megatron trainer on GPUs: random weights, packs of varying length.

    python benchmarks/train_step.py --model qwen3-4b [--gpus 2 --words "--tensor-model-parallel-size 2"]

Each step is forward, backward, reduction, clipping and Adam of a GRPO loss with entropy, through
`MegatronTrainer.train_step`. Prints JSON: seconds of every step, tokens per second and GPU, model
FLOP/s (recomputation and padding not counted; the output layer only where a response is predicted)
against the rate of an 8192^3 bf16 product of the same run, peak memory. --profile adds a table of
kernels.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, model_config

PROMPT = 256


def sample_lengths(count: int, longest: int, seed: int) -> list[int]:
    """Prompt and response together: log-normal responses with a median of a quarter of the longest."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    lengths = (longest / 4) * (0.7 * noise).exp()
    return [PROMPT + int(x) for x in lengths.clamp(64, longest - PROMPT)]


def step_flops(config: dict[str, Any], lengths: list[int]) -> float:
    """Model FLOPs of one step over samples of these lengths: 6 per active weight and token."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, groups, size = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
    )
    attention = hidden * size * (2 * heads + 2 * groups)
    if experts := config.get("num_experts"):
        active = config["num_experts_per_tok"] * config["moe_intermediate_size"]
        mlp = 3 * hidden * active + hidden * experts
    else:
        mlp = 3 * hidden * config["intermediate_size"]
    tokens, responses = sum(lengths), sum(n - PROMPT for n in lengths)
    linear = 6.0 * tokens * layers * (attention + mlp)
    scores = 6.0 * layers * heads * size * sum(n * n for n in lengths)
    return linear + scores + 6.0 * responses * hidden * config["vocab_size"]


def matmul_rate() -> float:
    """FLOP/s of an 8192^3 bf16 product on random data, median of 20."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times: list[float] = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(times[5:])


def build(options: argparse.Namespace, rank: int, folder: Path) -> tuple[Any, Any, Any]:
    """(trainer, its batch, the run's configuration)."""
    from slime.checkpoint.convert import megatron_flags_from_hf
    from slime.cli.parse import load_config
    from slime.config.layout import data_parallel_rank, data_parallel_size, micro_batch_multiple
    from slime.data.sample import Sample
    from slime.training.batching import make_rollout_batches

    shape = model_config(options.model, options.layers)
    words = (
        f"--hf-checkpoint {folder} --num-rollout 80 --rollout-batch-size {options.samples} "
        f"--n-samples-per-prompt 1 --global-batch-size {options.samples} --lr 1e-6 "
        f"--actor-num-gpus-per-node {options.gpus} --rollout-num-gpus 1 --debug-train-only "
        "--disable-rollout-global-dataset --use-dynamic-batch-size --balance-data "
        f"--max-tokens-per-gpu {options.max_tokens} {options.words}"
    ).split()
    config = load_config([*words, *megatron_flags_from_hf(shape)])
    trainer = start_trainer(config, options, rank, has_optimizer=not options.forward_backward)
    fill_with_noise(trainer)
    generator = torch.Generator().manual_seed(options.seed)
    samples = [
        Sample(
            group_index=i,
            index=i,
            tokens=torch.randint(shape["vocab_size"], (n,), generator=generator).tolist(),
            response_length=n - PROMPT,
            reward=float(i % 2),
            status=Sample.Status.COMPLETED,
        )
        for i, n in enumerate(sample_lengths(options.samples, options.longest, options.seed))
    ]
    rewards = [float(sample.reward) - 0.5 for sample in samples]
    batches = make_rollout_batches(
        samples,
        rewards,
        rewards,
        config,
        rollout_id=0,
        dp_size=data_parallel_size(config),
        cp_size=config.context_parallel_size,
        micro_batch_multiple=micro_batch_multiple(config),
    )
    return trainer, batches[data_parallel_rank(config, rank)], config


def start_trainer(
    config: Any, options: argparse.Namespace, rank: int, *, has_optimizer: bool = True
) -> Any:
    """Rank `rank` of a trainer, on this host; without an optimizer it has none of its memory."""
    from slime.backends.megatron import trainer as megatron_trainer

    if not has_optimizer:
        megatron_trainer.build_optimizer = lambda args, model: NoOptimizer()
    return megatron_trainer.MegatronTrainer(
        config,
        rank=rank,
        world_size=options.gpus,
        local_rank=rank,
        master_addr="127.0.0.1",
        master_port=options.port,
    )


@torch.no_grad()
def fill_with_noise(trainer: Any) -> None:
    """Random weights in place of a checkpoint, the same on every run."""
    torch.cuda.manual_seed(0)
    for chunk in trainer._bare:
        for name, weight in chunk.named_parameters():
            if weight.dim() == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                weight.normal_(0.0, 0.02)
    trainer._optimizer.reload_model_params()


class NoOptimizer:
    """In place of Megatron's for --forward-backward: it has no weights and takes no step."""

    def __init__(self) -> None:
        self.optimizer = None
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "weight_decay": 0.0}]

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def reload_model_params(self) -> None:
        """There are no others."""

    def zero_grad(self) -> None:
        """Gradients are in the model's buffers."""

    def prepare_grads(self) -> bool:
        return False

    def get_grad_norm(self) -> float:
        return 0.0

    def step_with_ready_grads(self) -> bool:
        return True


def columns_of(batch: Any) -> dict[str, Any]:
    """What a GRPO loss reads of the batch's only step."""
    masks, plan = batch.loss_masks.rows(), batch.steps[0]
    return {
        "weight": [mask / max(float(mask.sum()), 1.0) / plan.num_rollouts for mask in masks],
        "loss_mask": masks,
        "advantages": [
            torch.full_like(mask, reward) for mask, reward in zip(masks, batch.rewards, strict=True)
        ],
    }


def run_rank(options: argparse.Namespace, rank: int) -> None:
    """All steps of one rank; rank 0 prints."""
    torch.cuda.set_device(rank)
    started = time.monotonic()
    rate = matmul_rate()
    from slime.training.interface import TrainStep
    from slime.training.losses import make_loss_fn

    folder = Path(tempfile.mkdtemp())
    shape = model_config(options.model, options.layers)
    (folder / "config.json").write_text(json.dumps(shape))
    trainer, batch, config = build(options, rank, folder)
    plan = batch.steps[0]
    step = TrainStep(batch=batch, plan=plan, columns=columns_of(batch), needs_entropy=True)
    loss_fn = make_loss_fn(config)
    seconds: list[float] = []
    metrics: dict[str, float] = {}
    setup = time.monotonic() - started
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for number in range(options.warmup + options.steps):
        torch.cuda.synchronize()
        start = time.monotonic()
        metrics = trainer.train_step(step, loss_fn)
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
        if number > options.warmup and on_all_ranks(time.monotonic() - started > options.limit_s):
            break
    peak = torch.cuda.max_memory_allocated()
    if options.profile:
        profile_step(trainer, step, loss_fn, Path(options.profile) if rank == 0 else None)
    if rank:
        return
    lengths = sample_lengths(options.samples, options.longest, options.seed)
    flops = step_flops(shape, lengths) / options.gpus
    times = seconds[options.warmup :]
    median = statistics.median(times)
    report = {
        "model": options.model,
        "layers": shape["num_hidden_layers"],
        "gpus": options.gpus,
        "words": options.words,
        "whole_step": not options.forward_backward,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "attention": attention_name(options.words),
        "tokens_per_step": sum(lengths),
        "sample_tokens": [min(lengths), max(lengths)],
        "micro_batches_per_rank": len(plan.micro_batches),
        "max_tokens_per_gpu": options.max_tokens,
        "steps": len(times),
        "median_s": round(median, 4),
        "spread_s": [round(min(times), 4), round(max(times), 4)],
        "warmup_s": [round(x, 2) for x in seconds[: options.warmup]],
        "setup_s": round(setup, 1),
        "model_tflops_per_gpu": round(flops / median / 1e12, 1),
        "matmul_tflops": round(rate / 1e12, 1),
        "share_of_matmul_rate": round(flops / median / rate, 4),
        "tokens_per_s_per_gpu": round(sum(lengths) / options.gpus / median),
        "gib_before": round(before / 2**30, 2),
        "peak_gib": round(peak / 2**30, 2),
        "loss": metrics["loss"],
        "grad_norm": metrics["grad_norm"],
    }
    sys.stdout.write(json.dumps(report) + "\n")


def on_all_ranks(is_late: bool) -> bool:
    """What rank 0 says: clocks differ, and ranks that end at different steps wait for ever."""
    flag = torch.tensor(float(is_late), device="cuda")
    torch.distributed.broadcast(flag, 0)
    return bool(flag)


def attention_name(words: str) -> str:
    """The attention kernel in use."""
    if "transformer_engine" in words:
        return "TransformerEngine"
    from slime.backends.megatron.layers.attention import flash_attention_4

    return "torch varlen_attn" if flash_attention_4() is None else "flash-attn-4"


def profile_step(trainer: Any, step: Any, loss_fn: Any, path: Path | None) -> None:
    """One more step under torch's profiler; a table of kernels by their time on the card."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        trainer.train_step(step, loss_fn)
        torch.cuda.synchronize()
    if path is not None:
        table = recorded.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90
        )
        path.write_text(table)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def trainer_parser(description: str) -> argparse.ArgumentParser:
    """Words of every script that starts trainers: the model, its layout and its samples."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen3-4b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--words", default="", help="flags for the trainer")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--forward-backward",
        action="store_true",
        help="no optimizer: neither its memory nor its step",
    )
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def run_all_ranks(script: str, options: argparse.Namespace) -> int:
    """The script once for each card, as its ranks; the worst exit code."""
    command = [sys.executable, script, *sys.argv[1:], "--port", str(free_port()), "--rank"]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(options.gpus)]
    return max(rank.wait() for rank in ranks)


def main() -> None:
    parser = trainer_parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=1e9, help="no new step after so long")
    parser.add_argument("--profile", help="file for a table of kernels")
    options = parser.parse_args()
    if options.rank is None:
        sys.exit(run_all_ranks(__file__, options))
    run_rank(options, options.rank)


if __name__ == "__main__":
    main()
