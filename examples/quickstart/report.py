"""The quickstart's final table, from the run's own metrics, and answers of the exported model."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MAX_RANDOM_ANSWERS = 4


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def series(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Values of one metric in the order they were logged."""
    return [row[name] for row in rows if name in row]


def show_learning(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print what GRPO changed."""
    rewards = series(rows, "rollout/raw_reward")
    accuracy = series(rows, "eval/held_out")
    lengths = series(rows, "rollout/response_len/mean")
    mismatch = series(rows, "train/train_rollout_logprob_abs_diff")
    table = Table("", "before GRPO", "after", title="middle letter, 512 fresh held-out prompts")
    table.add_row("held-out accuracy, greedy", f"{accuracy[0]:.3f}", f"{accuracy[-1]:.3f}")
    table.add_row("mean reward at temperature 1", f"{rewards[0]:.3f}", f"{rewards[-1]:.3f}")
    table.add_row("mean answer length, tokens", f"{lengths[0]:.1f}", f"{lengths[-1]:.1f}")
    console.print(table)
    console.print(
        f"trainer against engine: mean |log-prob difference| {max(mismatch):.1e} at most, over "
        f"{len(mismatch)} steps."
    )
    console.print(
        "What RL did here: the demonstrations hold two habits, 30 % careful (sort, then answer) and "
        "70 % hasty. GRPO selected and sharpened the careful one. It taught no skill that the "
        "demonstrations did not plant."
    )


def show_answers(console: Console, run: Path) -> None:
    """Let transformers load the exported model and answer some held-out prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    folder = run / "grpo" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    load = f"AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    console.print(f"answers of {load}:", soft_wrap=True)
    for line in (run / "data" / "held_out.jsonl").read_text().splitlines()[:MAX_RANDOM_ANSWERS]:
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt"
        )
        ids = prompt["input_ids"]
        output = model.generate(ids, max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        console.print(
            f"  {row['prompt'][0]['content']} -> {answer}   (right: {row['label']})", markup=False
        )


def show_times(console: Console, started: float, setup: Path) -> None:
    """Print installation and run apart."""
    if setup.exists():
        facts = json.loads(setup.read_text())
        size = facts["downloaded_bytes"]  # None where the system does not count
        text = "" if size is None else f", {size / 1e9:.2f} GB downloaded"
        console.print(f"set-up, when it was made: {facts['seconds']} s{text}")
    console.print(f"run: {time.time() - started:.0f} s")


def main() -> None:
    """Print the table for one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--started", type=float, default=time.time())
    parser.add_argument("--setup", type=Path, default=Path(".venv/setup.json"))
    options = parser.parse_args()
    console = Console()
    show_learning(console, read_metrics(options.run / "grpo" / "metrics.jsonl"))
    show_answers(console, options.run)
    show_times(console, options.started, options.setup)
    console.print(
        f"metrics, samples, checkpoints and the exported model: {options.run}", soft_wrap=True
    )


if __name__ == "__main__":
    main()
