r"""One weight sync, from pause to resume: a trainer with random weights, and stock SGLang servers.

    python benchmarks/weight_sync.py --model qwen3-4b --gpus 1            # both on one card, CUDA IPC
    python benchmarks/weight_sync.py --model qwen3-4b --gpus 1 --apart    # the engine on a card of its own, NCCL
    python benchmarks/weight_sync.py --model qwen3-30b-a3b --gpus 2 --engine-gpus 2 \
        --words "--expert-model-parallel-size 2"

The way is that of a run (`slime.orchestration.ways`): gather, Hugging Face's form, buckets, checksums of
both sides. Prints JSON: medians over the syncs after the first, by what rank 0 spent its time on, and the
rate of a plain copy over the same link in the same run.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shapes import model_config
from train_step import (
    fill_with_noise,
    run_all_ranks,
    start_trainer,
    trainer_parser,
)

PHASES = ("pause", "gather", "send", "load", "verify", "resume")
GB = 1e9


def make_config(options: argparse.Namespace) -> Any:
    """Of a run with this trainer and these engines."""
    from slime.checkpoint.convert import megatron_flags_from_hf
    from slime.cli.parse import load_config

    engines = f"--rollout-num-gpus {options.engines * options.engine_gpus}"
    where = "--colocate --no-offload-train --no-offload-rollout" if not options.apart else engines
    words = (
        f"--hf-checkpoint {options.folder} --num-rollout 1 --rollout-batch-size 8 "
        "--n-samples-per-prompt 1 --global-batch-size 8 --lr 1e-6 --rollout-engine sglang "
        f"--device {options.device} --actor-num-gpus-per-node {options.gpus} {where} "
        f"--rollout-num-gpus-per-engine {options.engine_gpus} --disable-rollout-global-dataset "
        f"--update-weight-buffer-size {options.bucket_mib * 2**20} "
        f"{'' if options.verify else '--no-verify-weight-sync'} "
        "--sglang-skip-tokenizer-init --sglang-load-format dummy --sglang-mem-fraction-static "
        f"{options.engine_memory} --sglang-mm-feature-transport cpu {options.engine_words} {options.words}"
    ).split()
    config = load_config(
        [*words, *megatron_flags_from_hf(model_config(options.model, options.layers))]
    )
    return replace(config, device=options.device)


def run_engines_and_ranks(options: argparse.Namespace) -> int:
    """Start the engines, run the ranks beside them, end the engines."""
    from slime.engines.ports import hold_port
    from slime.engines.servers import ServerProcess
    from slime.engines.sglang.launch import launch

    config = make_config(options)
    first = options.gpus if options.apart else 0
    count = first + options.engines * options.engine_gpus
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    logs, start = Path(options.logs or tempfile.mkdtemp()), time.monotonic()
    servers: list[ServerProcess] = []
    try:
        for i in range(options.engines):
            port = hold_port()
            spec = launch(config, index=i, host="127.0.0.1", port=port, log_dir=logs)
            cards = range(first + i * options.engine_gpus, first + (i + 1) * options.engine_gpus)
            if options.device == "cuda":
                devices = {"CUDA_VISIBLE_DEVICES": ",".join(mine[card] for card in cards)}
                spec = replace(spec, env=spec.env | devices)
            servers.append(ServerProcess(spec))
        os.environ["ENGINES"] = " ".join(server.spec.url for server in servers)
        for server in servers:
            server.wait_healthy(options.start_limit_s)
        sys.stderr.write(f"engines are up after {time.monotonic() - start:.0f} s\n")
        return run_all_ranks(__file__, options)
    finally:
        for server in servers:
            server.stop()


def run_rank(options: argparse.Namespace, rank: int) -> None:
    """All syncs of one rank; rank 0 prints."""
    from slime.orchestration.ways import make_way

    logging.getLogger("httpx").setLevel(logging.WARNING)
    on_cuda = options.device == "cuda"
    if on_cuda:
        torch.cuda.set_device(rank)
    config = make_config(options)
    halve_gradients()
    trainer = start_trainer(config, options, rank, has_optimizer=False)
    if on_cuda:
        drop_gradients(trainer)
        fill_with_noise(trainer)
    urls = tuple(os.environ["ENGINES"].split())
    way = make_way(
        config, urls, rank=rank, host="127.0.0.1", has_same_weights=False, engines_are_away=False
    )
    if way is not None:
        way.open()
    reports: list[Any] = []
    walls: list[float] = []
    for number in range(options.syncs + 1):
        torch.distributed.barrier()
        start = time.monotonic()
        if way is None:
            for _ in trainer.named_weights():
                pass
            continue
        way.begin()
        report = way.sync(trainer.named_weights(), str(number + 1))
        walls.append(time.monotonic() - start)
        reports.append(report)
    if rank == 0:
        sys.stdout.write(json.dumps(summary(options, reports, walls)) + "\n")
        sys.stdout.flush()
    torch.distributed.barrier()
    if way is not None:
        way.close()


def halve_gradients() -> None:
    """In bf16 they leave room for both sides of a big model until `drop_gradients`; nothing is trained."""
    from slime.backends.megatron import model

    of_a_run = model.ddp_config
    model.ddp_config = lambda args: replace(of_a_run(args), grad_reduce_in_fp32=False)


def drop_gradients(trainer: Any) -> None:
    """Their memory: a sync reads none of them, and a big model leaves no room for both sides' weights."""
    from slime.backends.megatron.optimizer.distributed import gradient_buffers

    for chunk in trainer._model:
        for buffer in gradient_buffers(chunk):
            buffer.grad_data.untyped_storage().resize_(0)
    torch.cuda.empty_cache()


def summary(options: argparse.Namespace, reports: list[Any], walls: list[float]) -> dict[str, Any]:
    """What rank 0 says."""
    later, first = reports[1:], reports[0]
    totals = [report.total_s for report in later]
    median = statistics.median(totals)
    shape = model_config(options.model, options.layers)
    on_cuda = options.device == "cuda"
    return {
        "model": options.model,
        "layers": shape["num_hidden_layers"],
        "trainer_gpus": options.gpus,
        "engines": options.engines,
        "engine_gpus": options.engine_gpus,
        "where": "apart" if options.apart else "colocated",
        "words": options.words,
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "torch": torch.__version__,
        "verified": options.verify,
        "gigabytes": round(first.num_bytes / GB, 3),
        "tensors": first.num_tensors,
        "buckets": first.num_buckets,
        "bucket_mib": options.bucket_mib,
        "syncs": len(later),
        "first_s": round(first.total_s, 4),
        "median_s": round(median, 4),
        "spread_s": [round(min(totals), 4), round(max(totals), 4)],
        "median_wall_s": round(statistics.median(walls[1:]), 4),
        "phases_s": {
            name: round(statistics.median(getattr(r, f"{name}_s") for r in later), 4)
            for name in PHASES
        },
        "gb_per_s": round(first.num_bytes / GB / median, 1),
        "link_gb_per_s": round(link_rate(options.gpus if options.apart else 0), 1)
        if on_cuda
        else None,
        "same_digest": len({report.digest for report in reports}) == 1,
    }


def link_rate(card: int) -> float:
    """GB/s of a plain copy of 1 GiB from card 0 to `card`, median of 20."""
    source = torch.ones(2**30, dtype=torch.uint8, device="cuda:0")
    target = torch.empty(2**30, dtype=torch.uint8, device=f"cuda:{card}")
    times: list[float] = []
    for _ in range(22):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return source.numel() / GB / statistics.median(times[2:])


def main() -> None:
    parser = trainer_parser("One weight sync, from pause to resume.")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--engine-gpus", type=int, default=1, help="tensor-parallel size of each")
    parser.add_argument("--apart", action="store_true", help="engines on cards of their own")
    parser.add_argument("--syncs", type=int, default=10)
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    parser.add_argument("--engine-memory", type=float, default=0.3)
    parser.add_argument(
        "--engine-words",
        # The fused all-reduce of experts is compiled at the start, for minutes, and no sync uses it.
        default="--sglang-disable-cuda-graph --sglang-enforce-disable-flashinfer-allreduce-fusion",
        help="flags for the engines",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--start-limit-s", type=float, default=300)
    parser.add_argument("--logs", help="folder for the engines' logs")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is None:
        folder = Path(tempfile.mkdtemp())
        shape = model_config(options.model, options.layers)
        (folder / "config.json").write_text(json.dumps(shape))
        sys.argv += ["--folder", str(folder)]
        options.folder = str(folder)
        sys.exit(run_engines_and_ranks(options))
    run_rank(options, options.rank)


if __name__ == "__main__":
    main()
