"""What the quickstart learns and how long it takes, seed by seed.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--folder runs/benchmark]

Runs examples/quickstart/run.sh once per seed, unless its folder is there already, and prints JSON: reward and accuracy
before and after, the largest mean difference between trainer's and engines' log-probs, seconds of the run and of each
phase. Set-up is timed apart, by scripts/setup.sh (.venv/setup.json).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from slime.observability.trackers import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("rollout", "rollout_data", "train", "update_weights", "step")
LAST_ROUNDS = 5


def run_seed(seed: int, folder: Path) -> float | None:
    """Run the quickstart into `folder`; its wall-clock seconds, None when it had been run before."""
    if (folder / "grpo" / "hf").is_dir():
        return None
    start = time.perf_counter()
    command = ["bash", str(ROOT / "examples" / "quickstart" / "run.sh"), str(seed), str(folder)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return time.perf_counter() - start


def measure(folder: Path) -> dict[str, Any]:
    """The numbers of one finished run."""
    rows = read_metrics(folder / "grpo" / "metrics.jsonl")

    def series(name: str) -> list[float]:
        return [row[name] for row in rows if name in row]

    rewards, accuracy = series("rollout/raw_reward"), series("eval/held_out")
    return {
        "reward_first_round": rewards[0],
        "reward_last_round": rewards[-1],
        f"reward_mean_last_{LAST_ROUNDS}": statistics.fmean(rewards[-LAST_ROUNDS:]),
        "rounds_to_reward_0.9": next((i for i, r in enumerate(rewards, 1) if r >= 0.9), None),
        "held_out_accuracy": accuracy,
        "train_rollout_logprob_abs_diff_max": max(series("train/train_rollout_logprob_abs_diff")),
        "seconds_by_phase": {
            phase: {
                "median": statistics.median(series(f"perf/{phase}_time")),
                "max": max(series(f"perf/{phase}_time")),
                "sum": sum(series(f"perf/{phase}_time")),
            }
            for phase in PHASES
        },
    }


def main() -> None:
    """Print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark")
    options = parser.parse_args()
    result: dict[str, Any] = {"cpus": os.cpu_count(), "load_before": os.getloadavg()[0]}
    for seed in options.seeds:
        folder = options.folder / f"seed{seed}"
        seconds = run_seed(seed, folder)
        result[f"seed {seed}"] = {"run_seconds": seconds} | measure(folder)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
