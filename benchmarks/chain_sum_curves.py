"""The curves of examples/chain-sum: rows of runs from their metrics, and a picture of rows.

    python benchmarks/chain_sum_curves.py add NAME RUN_FOLDER [NOTE]  # a row of results/chain_sum_settings.jsonl
    python benchmarks/chain_sum_curves.py draw NAME [NAME ...]              # docs/images/chain_sum.svg

A row holds the settings of the run's config.json, greedy accuracy on dev.jsonl and held_out.jsonl by the number of
rounds trained, and for each round its seconds, the mean reward of the training samples, and the mean |log_probs -
rollout_log_probs| over its steps. Prints the row.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from curves import MARGIN, Panel, picture, text

from slime.observability.trackers import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "results" / "chain_sum_settings.jsonl"
PICTURE = ROOT / "docs" / "images" / "chain_sum.svg"
WIDTH, HEIGHT = 380, 300
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#555555")
GOAL = 0.9
CLOSE = 0.02  # goal of the log-probs' difference

Row = dict[str, Any]
SETTINGS = {
    "prompts": "rollout_batch_size", "samples_per_prompt": "n_samples_per_prompt",
    "samples_per_step": "global_batch_size", "lr": "lr", "eps_clip_high": "eps_clip_high",
    "kl_loss_coef": "kl_loss_coef", "entropy_coef": "entropy_coef", "reward": "reward_key",
    "estimator": "advantage_estimator", "temperature": "rollout_temperature", "seed": "seed",
}  # fmt: skip


def row_of(folder: Path, name: str, note: str) -> Row:
    """One run: settings, accuracies by round, and what its rounds were.

    Raises:
        OSError: the folder has no config.json or no metrics.
    """
    config = json.loads((folder / "config.json").read_text())
    rows = read_metrics(folder / "metrics.jsonl")
    rounds = [row for row in rows if "perf/round_time" in row]
    steps = [row for row in rows if "train/train_rollout_logprob_abs_diff" in row]
    evals = [row for row in rows if "eval/dev" in row]
    differences = [row["train/train_rollout_logprob_abs_diff"] for row in steps]
    per_round = (
        config["rollout_batch_size"] * config["n_samples_per_prompt"] // config["global_batch_size"]
    )
    cuts = range(0, len(differences) - per_round + 1, per_round)
    return {
        "run": name,
        **{key: config[flag] for key, flag in SETTINGS.items()},
        "dev_by_round": {str(int(row["eval/step"])): round(row["eval/dev"], 3) for row in evals},
        "held_out_by_round": {str(int(row["eval/step"])): round(row["eval/held_out"], 3) for row in evals},
        "round_s": [round(row["perf/round_time"], 2) for row in rounds],
        "reward_by_round": [round(row["rollout/raw_reward"], 3) for row in rows if "rollout/raw_reward" in row],
        "log_prob_difference_by_round": [round(fmean(differences[i : i + per_round]), 4) for i in cuts],
        "note": note,
    }  # fmt: skip


def draw(rows: Sequence[Row]) -> str:
    """Two panels beside each other: accuracy on held_out.jsonl, and the log-probs' difference, by round."""
    longest = max(len(row["round_s"]) for row in rows)
    worst = max(CLOSE, *(max(row["log_prob_difference_by_round"]) for row in rows))
    right = Panel(WIDTH, HEIGHT, longest)
    apart = Panel(WIDTH, HEIGHT, longest, 1.1 * worst, left=WIDTH)
    parts = [
        *right.axes(GOAL, f"round {longest}"),
        *apart.axes(CLOSE, f"round {longest}"),
        text(MARGIN, 28, "#555", "right of 512 held-out problems, greedy"),
        text(WIDTH + MARGIN, 28, "#555", "mean |log-prob of trainer - of engine|"),
    ]
    for i, row in enumerate(rows):
        colour = COLOURS[i % len(COLOURS)]
        accuracies = [(int(k), value) for k, value in row["held_out_by_round"].items()]
        words = (
            f"{row['run']}: {row['prompts']} x {row['samples_per_prompt']}, {row['samples_per_step']} a step, "
            f"{row['lr']:g}, KL {row['kl_loss_coef']:g}, reward {row['reward']}"
        )
        parts += [
            right.line(accuracies, colour),
            apart.line(enumerate(row["log_prob_difference_by_round"]), colour),
            text(MARGIN, HEIGHT + 16 * (i + 1), colour, words),
        ]
    return picture(2 * WIDTH, HEIGHT + 16 * (len(rows) + 1), parts)


def main() -> None:
    """`add` or `draw`."""
    parser = argparse.ArgumentParser(description="Rows and curves of examples/chain-sum.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add")
    add.add_argument("name")
    add.add_argument("folder", type=Path)
    add.add_argument("note", nargs="?", default="")
    commands.add_parser("draw").add_argument("names", nargs="+")
    options = parser.parse_args()
    if options.command == "add":
        line = json.dumps(row_of(options.folder, options.name, options.note))
        with ROWS.open("a") as file:
            file.write(line + "\n")
        sys.stdout.write(line + "\n")
        return
    rows = {row["run"]: row for row in map(json.loads, ROWS.read_text().splitlines())}
    if missing := [name for name in options.names if "dev_by_round" not in rows.get(name, {})]:
        parser.error(f"{ROWS.name} has no rows with curves for {missing}")
    PICTURE.write_text(draw([rows[name] for name in options.names]))


if __name__ == "__main__":
    main()
