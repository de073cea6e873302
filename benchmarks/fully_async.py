"""Generating all the time against rounds: train.py, train_async.py and train_async.py --fully-async, paired.

    python benchmarks/fully_async.py --task quickstart --out runs/fully_async [--seeds 0 1] [--modes ...]
    python benchmarks/fully_async.py --task lengths --model qwen3-0.6b --device cuda --gpus 2 --out runs/fully_async

Modes: `sync` (train.py), `colocated` (train.py --colocate: both sides take turns on all GPUs), `resident` (the same
without offload), `one-step-off` (train_async.py), `fully-async-N` (--fully-async with --max-weight-staleness N, half of
the GPUs for each side), `at-once-N` (the same with both sides on all GPUs, without offload), `in-place-N` (that, and
running requests keep what they have read under older weights). For each seed all modes run one after the other, in an
order that rotates; what OUT has is not run again.

Tasks, both with heavy-tailed lengths (log-normal: --median of --longest, --sigma):
  quickstart  the middle letter from the quickstart's supervised start (made once, or --start FOLDER, a folder of
              the quickstart with data/ and sft/hf). After its answer each sample writes on for its length, which
              is thrown away: engines have the work of long answers, and reward and loss are the task's
  lengths     random weights of a real shape (workload.py), answers of exactly their length, all of it trained

Throughput is response tokens trained per second of rounds, without the first --warmup rounds and the last
--tail ones, beside which nothing is generated any more. JSON lines go to OUT/fully_async-TASK.jsonl, and with
--report NAME a table to benchmarks/results/NAME.md (and .jsonl).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from race.sizes import QUICKSTART, QUICKSTART_SIZE, environment, make_start
from shapes import model_config
from workload import host, make_model, response_length, response_lengths, write_prompts

from slime.checkpoint.convert import megatron_flags_from_hf
from slime.checkpoint.hf import read_hf_config
from slime.data.sample import Sample
from slime.observability.ledger import lineage, read_events
from slime.observability.ledger_audit import audit
from slime.observability.phases import Phase
from slime.observability.trackers import read_metrics
from slime.rollout.sglang_rollout import generate as one_turn

ROOT = Path(__file__).resolve().parents[1]
MODES = (
    "sync",
    "colocated",
    "resident",
    "one-step-off",
    "fully-async-1",
    "fully-async-2",
    "fully-async-4",
    "at-once-2",
    "at-once-4",
    "in-place-4",
)
SHARED = ("--colocate", "--no-offload-train", "--no-offload-rollout")
IN_PLACE = ("--update-weight-pause-mode", "in_place", "--sglang-disable-radix-cache")
LAST_REWARDS = 10
PROMPT_ROOM = 40  # tokens of a prompt and its answer, beside those that are thrown away
BALLAST = "FULLY_ASYNC_LENGTHS"


# --- the quickstart's answers, with the lengths of long ones ---


async def answer(
    args: Any, sample: Sample, sampling_params: Mapping[str, Any], evaluation: bool = False
) -> Sample:
    """For --custom-generate-function-path: the answer, then as many thrown-away tokens as its length says."""
    answered = await one_turn(args, sample, sampling_params)
    length = 0 if evaluation else _length(args.rollout_seed, sample.index or 0)
    if length and answered.status is not Sample.Status.ABORTED:
        ballast = Sample(tokens=list(answered.tokens), index=sample.index)
        await one_turn(
            args, ballast, {**sampling_params, "max_new_tokens": length, "ignore_eos": True}
        )
    return answered


def _length(seed: int, index: int) -> int:
    longest, median, sigma = json.loads(os.environ[BALLAST])
    noise = np.random.default_rng((seed, index)).standard_normal()
    return response_length(noise, longest, median=median, sigma=sigma)


def _ballast(options: argparse.Namespace) -> str:
    return json.dumps([options.longest, options.median, options.sigma])


# --- command lines ---


def mode_flags(mode: str) -> tuple[str, list[str]]:
    """The script, and what it gets more than the others."""
    if mode == "sync":
        return "train.py", []
    if mode == "colocated":
        return "train.py", ["--colocate"]
    if mode == "resident":
        return "train.py", [*SHARED]
    if mode == "one-step-off":
        return "train_async.py", ["--use-tis"]
    kind, _, staleness = mode.rpartition("-")
    flags = ["--fully-async", "--max-weight-staleness", staleness, "--use-tis"]
    if kind != "fully-async":
        flags += SHARED
    return "train_async.py", [*flags, *(IN_PLACE if kind == "in-place" else ())]


def common_flags(options: argparse.Namespace, mode: str, seed: int, run_dir: Path) -> list[str]:
    train, rollout = options.gpus // 2, options.gpus - options.gpus // 2
    if mode in ("colocated", "resident") or mode.startswith(("at-once-", "in-place-")):
        train = rollout = options.gpus
    return (
        f"--device {options.device} --run-dir {run_dir} --actor-num-nodes 1 "
        f"--actor-num-gpus-per-node {train} --rollout-num-gpus {rollout} "
        f"--rollout-num-gpus-per-engine 1 --num-rollout {options.rounds} "
        f"--rollout-batch-size {options.prompts} --n-samples-per-prompt {options.samples} "
        f"--global-batch-size {options.prompts * options.samples} --use-dynamic-batch-size "
        f"--max-tokens-per-gpu {options.max_tokens} --advantage-estimator grpo --eps-clip 0.2 "
        "--eps-clip-high 0.28 --entropy-coef 0 --optimizer adam --adam-beta1 0.9 --adam-beta2 0.98 "
        "--attention-dropout 0 --hidden-dropout 0 --rollout-shuffle --samples-per-rollout-logged 0 "
        f"--seed {seed} --rollout-seed {seed} --sglang-max-running-requests {options.places} "
        f"--sglang-server-concurrency {options.places} --no-live-view"
    ).split()


def start_folder(options: argparse.Namespace, out: Path) -> Path:
    """The quickstart's supervised start, with heads for the device and room for the longest answers."""
    if options.start:
        return Path(options.start).resolve()
    kind, room = "gpu" if options.device == "cuda" else "cpu", options.longest + PROMPT_ROOM
    data, model = QUICKSTART_SIZE.make_data
    model = (*model, "--size", kind, "--positions", str(room))
    name = f"{QUICKSTART_SIZE.name}-{kind}-{room}"
    return make_start(replace(QUICKSTART_SIZE, name=name, make_data=(data, model)), out)


def quickstart_flags(options: argparse.Namespace, out: Path) -> list[str]:
    start, size = start_folder(options, out), QUICKSTART_SIZE
    model = start / "sft" / "hf"
    flags = (
        f"--hf-checkpoint {model} --prompt-data {start}/data/train.jsonl --input-key prompt "
        "--label-key label --apply-chat-template --custom-rm-path middle_letter.reward "
        "--custom-generate-function-path fully_async.answer "
        f"--rollout-max-response-len {size.max_response_len} --eval-interval {options.rounds} "
        f"--eval-prompt-data held_out {start}/data/held_out.jsonl --n-samples-per-eval-prompt 1 "
        f"--eval-temperature 0 --eval-max-response-len {size.max_response_len} --lr {size.lr} "
        f"--min-lr {size.min_lr} --lr-decay-style linear --lr-warmup-iters {size.lr_warmup_steps} "
        "--weight-decay 0"
    ).split()
    return [*megatron_flags_from_hf(read_hf_config(model)), *flags]


def lengths_flags(options: argparse.Namespace, out: Path, seed: int) -> list[str]:
    folder = out / options.model
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model", options.model, options.tokenizer)
    count = options.prompts * options.samples * options.rounds
    prompts = folder / f"prompts-{seed}.jsonl"
    write_prompts(
        prompts, folder / "model", per_prompt=options.samples, tokens=options.prompt_tokens,
        lengths=response_lengths(count, options.longest, seed, median=options.median, sigma=options.sigma),
        seed=seed,
    )  # fmt: skip
    flags = (
        f"--hf-checkpoint {folder / 'model'} --prompt-data {prompts} --input-key prompt "
        "--metadata-key metadata --custom-generate-function-path workload.generate "
        f"--custom-rm-path workload.reward --rollout-max-response-len {options.longest} --lr 1e-6 "
        "--lr-decay-style constant --weight-decay 0.1"
    ).split()
    return [*megatron_flags_from_hf(model_config(options.model)), *flags]


# --- a run, and what it left ---


def run(options: argparse.Namespace, mode: str, seed: int, out: Path) -> dict[str, Any]:
    """One run, and its line."""
    run_dir = out / f"{options.task}-{mode}-{seed}-{time.strftime('%H%M%S')}"
    own = (
        quickstart_flags(options, out)
        if options.task == "quickstart"
        else lengths_flags(options, out, seed)
    )
    script, more = mode_flags(mode)
    words = [*own, *common_flags(options, mode, seed, run_dir), *more, *options.words.split()]
    paths = [
        *map(os.path.abspath, options.paths),
        str(ROOT / "benchmarks"),
        str(QUICKSTART),
        str(ROOT),
    ]
    if options.device == "cuda":
        paths += filter(None, [os.environ.get("PYTHONPATH")])
    env = os.environ if options.device == "cuda" else environment(1)
    env = {**env, "PYTHONPATH": os.pathsep.join(paths), BALLAST: _ballast(options)}
    env.pop("RAY_ADDRESS", None)
    load, start = os.getloadavg()[0], time.monotonic()
    log = out / f"{run_dir.name}.log"
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, str(ROOT / script), *words],
            stdout=file, stderr=subprocess.STDOUT, env=env, cwd=out, timeout=options.limit_s,
        ).returncode  # fmt: skip
    if code:
        raise SystemExit(f"{log.read_text(errors='replace')[-3000:]}\n{script} ended with {code}")
    line = {"task": options.task, "mode": mode, "seed": seed}
    line |= measure(options, run_dir) | {"wall_s": round(time.monotonic() - start, 1)}
    return line | {"load_before": load, "words": " ".join(words), **host()}


def measure(options: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    """The numbers of one finished run."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    last = options.rounds - options.tail
    rounds = [row for row in rows if options.warmup <= row.get("rollout/step", -1) < last]
    events = read_events(run_dir / "ledger.jsonl")
    made = lineage(events).rollouts
    numbers = range(options.warmup, last)
    if failed := sum(made[i][0]["samples"]["status"].count("failed") for i in made):
        raise SystemExit(f"{failed} samples failed: see {run_dir / 'logs'}")
    tokens = sum(sum(made[i][0]["samples"]["length"]) for i in numbers)
    if options.task == "quickstart":  # and what was thrown away
        seed = int(run_dir.name.split("-")[-2])
        os.environ[BALLAST] = _ballast(options)
        tokens += sum(_length(seed, n) for i in numbers for n in made[i][0]["samples"]["index"])
    seconds = sum(row["perf/step_time"] for row in rounds)
    ages = Counter(i + 1 - version for i in numbers for version in made[i][0]["samples"]["version"])
    rewards = [row["rollout/raw_reward"] for row in rows if "rollout/raw_reward" in row]
    diffs = [row["train/train_rollout_logprob_abs_diff"] for row in rows
             if "train/train_rollout_logprob_abs_diff" in row]  # fmt: skip
    return {
        "rounds": len(rounds),
        "round_s": round(seconds / len(rounds), 4),
        "sync_s": round(_mean(rounds, "perf/update_weights_time") or 0.0, 4),
        "pause_s": round(_mean(rounds, "perf/update_weights_pause_time") or 0.0, 4),
        "hold_s": round(_mean(rounds, "perf/update_weights_hold_time") or 0.0, 4),
        "tokens_per_s": round(tokens / seconds, 1),
        "samples_in_flight": round(
            statistics.fmean(row["perf/engines/samples_in_flight"] for row in rounds), 1
        ),
        "idle": {side: round(idle_share(rounds, side), 4) for side in ("trainer", "engines")},
        "staleness": {str(age): round(n / ages.total(), 4) for age, n in sorted(ages.items())},
        "reward_first": round(rewards[0], 4),
        "reward_last": round(statistics.fmean(rewards[-LAST_REWARDS:]), 4),
        "held_out": [round(row["eval/held_out"], 4) for row in rows if "eval/held_out" in row],
        "log_prob_difference_mean": round(statistics.fmean(diffs), 5),
        "tis_mean": _mean(rows, "train/tis"),
        "tis_clipped": _mean(rows, "train/tis_clipfrac"),
        "ledger": list(audit(events).problems),
    }


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return round(statistics.fmean(values), 5) if values else None


def idle_share(rounds: Sequence[Mapping[str, float]], side: str) -> float:
    """Of a side's time that in which it did nothing."""
    seconds = {
        phase: sum(row.get(f"perf/{side}/{phase}_time", 0.0) for row in rounds) for phase in Phase
    }
    return seconds[Phase.IDLE] / sum(seconds.values())


# --- the table ---


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row per mode, ratios of the same seed to `sync`, means over seeds."""
    by = {(line["mode"], line["seed"]): line for line in lines}
    modes = list(dict.fromkeys(line["mode"] for line in lines))
    head = (
        "| mode | tokens/s | to sync, each pair | engines: samples in flight | idle: trainer, engines | "
        "rounds old: share of samples | reward, last 10 | held out |\n|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(_row(mode, by) for mode in modes)


def _row(mode: str, by: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    own = [line for (name, _), line in by.items() if name == mode]
    ratios = [
        line["tokens_per_s"] / by["sync", line["seed"]]["tokens_per_s"]
        for line in own
        if ("sync", line["seed"]) in by
    ]

    def mean(values: Sequence[float]) -> float:
        return statistics.fmean(values)

    ages = sorted({age for line in own for age in line["staleness"]}, key=int)
    shares = ", ".join(
        f"{age}: {100 * mean([line['staleness'].get(age, 0.0) for line in own]):.0f} %"
        for age in ages
    )
    held_out = [line["held_out"][-1] for line in own if line["held_out"]]
    idle = [
        f"{100 * mean([line['idle'][side] for line in own]):.0f} %"
        for side in ("trainer", "engines")
    ]
    return (
        f"| {mode} | {mean([line['tokens_per_s'] for line in own]):,.0f} | "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} | "
        f"{mean([line['samples_in_flight'] for line in own]):.0f} | {', '.join(idle)} | {shares} | "
        f"{mean([line['reward_last'] for line in own]):.3f} | "
        f"{f'{mean(held_out):.3f}' if held_out else ''} |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--task", choices=("quickstart", "lengths"), default="quickstart")
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", default="runs/fully_async")
    parser.add_argument("--start", help="folder of the quickstart with data/ and sft/hf")
    parser.add_argument("--model", default="tiny", help="--task lengths: a shape of workload.py")
    parser.add_argument("--tokenizer", help="--task lengths: folder; by default a made-up one")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--gpus", type=int, default=2, help="slots, half of them to train")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="--task lengths")
    parser.add_argument("--longest", type=int, default=216, help="tokens of the longest answer")
    parser.add_argument("--median", type=float, default=0.25, help="length, of the longest")
    parser.add_argument("--sigma", type=float, default=0.7, help="of the lengths' logarithm")
    parser.add_argument("--places", type=int, default=64, help="requests at an engine at once")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a micro-batch and rank")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5, help="first rounds that do not count")
    parser.add_argument("--tail", type=int, default=5, help="last rounds that do not count")
    parser.add_argument("--limit-s", type=float, default=1200, help="of one run")
    parser.add_argument("--paths", nargs="*", default=[], help="first on PYTHONPATH of every run")
    parser.add_argument("--words", default="", help="more flags for every run, at their end")
    parser.add_argument("--report", help="name of the table in benchmarks/results")
    options = parser.parse_args()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"fully_async-{options.task}.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    for number, seed in enumerate(options.seeds):
        order = (
            options.modes[number % len(options.modes) :]
            + options.modes[: number % len(options.modes)]
        )
        for mode in order:
            if any((line["mode"], line["seed"]) == (mode, seed) for line in lines):
                continue
            lines.append(run(options, mode, seed, out))
            with path.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            sys.stdout.write(json.dumps(lines[-1]) + "\n")
            sys.stdout.flush()
    lines.sort(
        key=lambda line: options.modes.index(line["mode"]) if line["mode"] in options.modes else 99
    )
    sys.stdout.write(table(lines))
    if options.report:
        results = ROOT / "benchmarks" / "results"
        (results / f"{options.report}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )


if __name__ == "__main__":
    main()
