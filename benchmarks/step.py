"""Whole GRPO rounds through train.py on random weights: tokens per second and GPU, and where the time goes.

    python benchmarks/step.py --mode colocated --gpus 2 --out runs/bench [--model qwen3-4b]

--mode colocated: trainer and engines take turns on all GPUs; disaggregated: train.py with half of
them each; async: the same with train_async.py. A round is 32 prompts x 8 samples, answers of up to
2,048 tokens (seeded lengths, the same in each round), one optimizer step, one weight sync.

The line of JSON goes to OUT/step-MODEL-MODE-GPUS.json too; what is there is printed, not run again.
A run that reaches --limit-s is ended, and its whole rounds count if there are enough.

On a CPU: `--model tiny --device cpu --longest 32`, with the embedded engine.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shapes import model_config
from workload import (
    cards,
    count_parameters,
    host,
    make_model,
    response_lengths,
    write_prompts,
)

from slime.checkpoint.convert import megatron_flags_from_hf
from slime.observability.phases import Phase
from slime.observability.trackers import read_metrics

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
SCRIPTS = {"colocated": "train.py", "disaggregated": "train.py", "async": "train_async.py"}
STOP_S = 60.0
OVERHEAD = (Phase.SYNC, Phase.OFFLOAD, Phase.DATA, Phase.IDLE)
PARTS = (
    *("rollout", "rollout_data", "train", "log_probs", "actor_train", "sleep", "wake_up"),
    "update_weights",
    *(f"update_weights_{part}" for part in ("pause", "gather", "send", "load", "verify", "resume")),
)
HOST_ADAM = "--optimizer-cpu-offload --use-precision-aware-optimizer"

Row = Mapping[str, float]


def places(mode: str, gpus: int) -> tuple[int, int]:
    """(slots that train, slots that generate)."""
    if mode == "colocated":
        return gpus, gpus
    if gpus < 2:
        raise SystemExit(f"--mode {mode} wants GPUs for both sides: give --gpus 2 or more")
    return gpus // 2, gpus - gpus // 2


def num_rollout(options: argparse.Namespace) -> int:
    """Rounds of the run; train_async.py generates nothing beside the last one, which does not count."""
    return options.warmup + options.rounds + (options.mode == "async")


def needed_gib(options: argparse.Namespace, ranks: int) -> float:
    """Memory of a training rank: weights and gradients (6 bytes), its share of Adam (12), a pack.

    A pack of T tokens keeps about 34 bytes x hidden x layers x T, as in Korthikanti et al. 2022
    (arXiv:2205.05198, eq. 2, without the scores); 8 GiB for contexts, NCCL and what else sits there.
    """
    config = model_config(options.model)
    state = count_parameters(options.model) * (6 + 12 / ranks)
    pack = 34 * config["hidden_size"] * config["num_hidden_layers"] * options.max_tokens
    return (state + 1.15 * pack) / GIB + 8


def flags(options: argparse.Namespace, folder: Path, run_dir: Path) -> list[str]:
    """Everything train.py gets."""
    train, rollout = places(options.mode, options.gpus)
    is_on_gpu = options.device == "cuda"
    words = (
        f"--device {options.device} --hf-checkpoint {folder / 'model'} --run-dir {run_dir} "
        f"--actor-num-nodes 1 --actor-num-gpus-per-node {train} --rollout-num-gpus-per-engine 1 "
        f"--rollout-num-gpus {rollout} --prompt-data {folder / 'prompts.jsonl'} --input-key prompt "
        "--custom-generate-function-path workload.generate --custom-rm-path workload.reward "
        f"--num-rollout {num_rollout(options)} --rollout-batch-size {options.prompts} "
        f"--n-samples-per-prompt {options.samples} "
        f"--global-batch-size {options.prompts * options.samples} "
        f"--rollout-max-response-len {options.longest} --use-dynamic-batch-size --balance-data "
        f"--max-tokens-per-gpu {options.max_tokens} --advantage-estimator grpo --eps-clip 0.2 "
        "--eps-clip-high 0.28 --entropy-coef 0 --optimizer adam --lr 1e-6 --lr-decay-style constant "
        "--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98 --attention-dropout 0 "
        "--hidden-dropout 0 --samples-per-rollout-logged 0 "
    ).split()
    if options.mode == "colocated":
        words += ["--colocate"]
    if is_on_gpu:
        size = min(gib for _, gib in cards())
        if needed_gib(options, train) > size:
            words += HOST_ADAM.split()
        if train > 1:
            words += ["--overlap-grad-reduce", "--overlap-param-gather"]
    model = megatron_flags_from_hf(model_config(options.model))
    return [*words, *model, *shlex.split(options.words)]


def train(options: argparse.Namespace, words: Sequence[str], folder: Path) -> tuple[int, float]:
    """Run the script to its end or to --limit-s; (exit code, seconds)."""
    paths = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env.setdefault("OMP_NUM_THREADS", "1")
    env.pop("RAY_ADDRESS", None)
    start = time.monotonic()
    with (folder / f"{options.mode}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / SCRIPTS[options.mode]), *words],
            stdout=log, stderr=subprocess.STDOUT, env=env, cwd=folder,
        )  # fmt: skip
        try:
            process.wait(options.limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # servers and actors end with it
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return process.returncode, time.monotonic() - start


def shares_of(rounds: Sequence[Row], side: str) -> dict[str, float]:
    """Share of each phase of a side's time over these rounds; empty for a side there is not."""
    seconds = {
        str(phase): sum(row.get(f"perf/{side}/{phase}_time", 0.0) for row in rounds)
        for phase in Phase
    }
    total = sum(seconds.values())
    return {name: round(part / total, 4) for name, part in seconds.items() if part > 0}


def summary(options: argparse.Namespace, words: Sequence[str], run_dir: Path, wall_s: float) -> Any:
    """The line of JSON; None when too few rounds came to their end."""
    rows = read_metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    last = num_rollout(options) - (options.mode == "async")
    rounds = [row for row in rows if options.warmup <= row.get("rollout/step", -1) < last]
    if len(rounds) < min(options.rounds, 2):
        return None
    count = options.prompts * options.samples
    response_tokens = sum(lengths_of(options))
    tokens = rounds[0]["rollout/total_lengths"] * count
    seconds = [row["perf/round_time"] for row in rounds]
    median = statistics.median(seconds)
    shares = shares_of(rounds, "round")
    named = [row["train/train_rollout_logprob_abs_diff"] for row in rows
             if "train/train_rollout_logprob_abs_diff" in row]  # fmt: skip
    trains, rolls = places(options.mode, options.gpus)
    return {
        "benchmark": "step",
        "model": options.model,
        "mode": options.mode,
        "gpus": options.gpus,
        "train_gpus": trains,
        "rollout_gpus": rolls,
        "samples": count,
        "tokens": round(tokens),
        "response_tokens": response_tokens,
        "longest": options.longest,
        "rounds": len(rounds),
        "round_s": [round(x, 3) for x in seconds],
        "median_round_s": round(median, 3),
        "response_tokens_per_s_per_gpu": round(response_tokens / median / options.gpus, 1),
        "tokens_per_s_per_gpu": round(tokens / median / options.gpus, 1),
        "phases_s": {
            name: round(share * sum(seconds) / len(rounds), 4) for name, share in shares.items()
        },
        "shares": shares,
        "share_of_sync_offload_data_idle": round(
            sum(shares.get(name, 0.0) for name in OVERHEAD), 4
        ),
        "sides": {side: shares_of(rounds, side) for side in ("trainer", "engines")},
        "samples_in_flight": round(
            statistics.fmean(row["perf/engines/samples_in_flight"] for row in rounds), 1
        ),
        "parts_s": {
            name: round(statistics.fmean(row.get(f"perf/{name}_time", 0.0) for row in rounds), 4)
            for name in PARTS
        },
        "log_prob_difference": max(named) if named else None,
        "wall_s": round(wall_s, 1),
        "words": " ".join(words),
        **host(),
    }


def lengths_of(options: argparse.Namespace) -> list[int]:
    """Length of every answer of a round."""
    return response_lengths(options.prompts * options.samples, options.longest, options.seed)


def run(options: argparse.Namespace) -> int:
    """Run what is missing and print the line."""
    out = Path(options.out).resolve()
    name = f"step-{options.model}-{options.mode}-{options.gpus}"
    result = out / f"{name}.json"
    if result.exists():
        sys.stdout.write(result.read_text())
        return 0
    folder = out / f"step-{options.model}"
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model", options.model, options.tokenizer)
    write_prompts(
        folder / "prompts.jsonl", folder / "model", per_prompt=options.samples,
        lengths=lengths_of(options) * num_rollout(options),
        tokens=options.prompt_tokens, seed=options.seed,
    )  # fmt: skip
    run_dir = out / f"{name}-{time.strftime('%H%M%S')}"
    words = flags(options, folder, run_dir)
    code, wall_s = train(options, words, folder)
    line = summary(options, words, run_dir, wall_s)
    if line is None:
        log = (folder / f"{options.mode}.log").read_text(errors="replace")[-3000:]
        sys.stderr.write(f"{log}\n{SCRIPTS[options.mode]} ended with {code} after {wall_s:.0f} s\n")
        return 1
    text = json.dumps(line) + "\n"
    result.write_text(text)
    sys.stdout.write(text)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="qwen3-4b", help="a shape of workload.py")
    parser.add_argument("--mode", choices=tuple(SCRIPTS), default="colocated")
    parser.add_argument("--gpus", type=int, default=1, help="of both sides together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", default="runs/bench", help="folder of model, runs and results")
    parser.add_argument("--tokenizer", help="folder with a tokenizer; by default a made-up one")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--longest", type=int, default=2048, help="tokens of the longest answer")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a micro-batch and rank")
    parser.add_argument("--rounds", type=int, default=4, help="measured")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=420, help="end the run after so long")
    parser.add_argument("--words", default="", help="more flags for train.py, at their end")
    sys.exit(run(parser.parse_args()))


if __name__ == "__main__":
    main()
