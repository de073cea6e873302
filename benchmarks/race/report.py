"""The race's results as JSON, as a table, and as one small picture of the reward curves per size."""

import json
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

from curves import MARGIN, Panel, picture, text

from race.sizes import SIZES, VENV, Size

SIDES = ("slime", "trl")
COLOURS = {"slime": "#1f6feb", "trl": "#d1242f"}
WIDTH, HEIGHT = 640, 300

ROWS = (
    ("s a step, steady state (mean)", "s_per_step_mean", "{:.3f}"),
    ("s a step, steady state (median)", "s_per_step_median", "{:.3f}"),
    ("samples a second", "samples_per_s", "{:.1f}"),
    ("CPU s a step, all processes", "cpu_s_per_step", "{:.3f}"),
    ("steps to reward 0.9", "steps_to_goal", "{:.0f}"),
    ("s to reward 0.9, from the first step", "s_to_goal", "{:.1f}"),
    ("s to reward 0.9, start-up included", "s_to_goal_with_start_up", "{:.1f}"),
    ("start-up, s", "start_up_s", "{:.1f}"),
    ("all steps, s", "s_all_steps", "{:.1f}"),
    ("peak memory, all processes (PSS), GiB", "peak_pss_bytes", "{:.2f}"),
    ("processes at most", "peak_processes", "{:.0f}"),
    ("last reward", "last_reward", "{:.3f}"),
)

SAME = """\
The same on both sides: start weights (one SFT checkpoint, made by slime), prompts' file, chat template and
tokenizer, the reward (the very function), prompts and answers per step, one generation and one
optimizer step on all of it, temperature 1 without top-k or top-p, longest answer, stop token, fp32
throughout, no reference model, GRPO's advantages with the group's standard deviation, loss averaged
per answer and then over answers, clip 0.2 / 0.28, AdamW (0.9, 0.98, no weight decay), gradient norm
clipped at 1, linear warm-up and decay of the learning rate, no evaluation, no checkpoint on the way,
the two cores, torch and transformers of one version. Each side runs with the fastest of the settings
tried (below).

Not the same: the order of the prompts and the random numbers; the epsilon beside the standard
deviation (slime 1e-6, TRL 1e-4); slime logs every step to a file, TRL every tenth to its log; slime
verifies the checksums of all weights after each step and keeps samples, metrics and a lock in a run
folder; slime's engines and trainer are processes of their own under Ray, TRL is one process, which
is what start-up and memory show.
"""


def write_report(folder: Path, results: Path) -> dict[str, Any]:
    """Write all files into `results`; the JSON's content."""
    found = {name: _read(folder / name) for name in SIZES if (folder / name / "race").is_dir()}
    content = {"date": time.strftime("%Y-%m-%d"), "machine": _machine(), "versions": _versions()}
    content |= {"sizes": found}
    results.mkdir(parents=True, exist_ok=True)
    (results / "race_trl.json").write_text(json.dumps(content, indent=1) + "\n")
    (results / "race_trl.md").write_text(_page(content))
    for name, size in found.items():
        (results / f"race_trl_{name}.svg").write_text(_curves(size["runs"]))
    return {name: {k: size[k] for k in ("medians", "ratios")} for name, size in found.items()}


def _read(home: Path) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for path in sorted((home / "race").glob("*/summary.json")):
        run = json.loads(path.read_text())
        run["last_reward"] = statistics.fmean(run["rewards"][-5:])
        runs[path.parent.name.partition("-")[2]].append(run)
    medians = {side: _medians(of_side) for side, of_side in runs.items()}
    pairs = list(zip(runs["trl"], runs["slime"], strict=False))
    ratios = {
        key: [round(a[key] / b[key], 3) for a, b in pairs if a[key] and b[key]]
        for key in (
            "s_per_step_mean",
            "s_to_goal",
            "s_to_goal_with_start_up",
            "cpu_s_per_step",
            "peak_pss_bytes",
        )
    }
    tuned = json.loads((home / "tuned.json").read_text())
    return {"medians": medians, "ratios": ratios, "tuned": tuned, "runs": runs}


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    values = {key: [run[key] for run in runs] for _, key, _ in ROWS}
    return {
        key: None if None in column or not column else statistics.median(column)
        for key, column in values.items()
    }


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if "model name" in line), "")
    memory = Path("/proc/meminfo").read_text().split()[1]
    cpus = sum(line.startswith("processor") for line in info)
    return {
        "cpu": model or platform.machine(),
        "cpus": cpus,
        "memory_gib": round(int(memory) / 2**20),
    }


def _versions() -> dict[str, str]:
    ours = {
        name: version(name) for name in ("torch", "transformers", "megatron-core", "ray", "smg")
    }
    site = next((VENV / "lib").glob("python*/site-packages"))
    trl = next(site.glob("trl-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    theirs = {
        f"TRL's {name}": next(site.glob(f"{name}-*.dist-info"))
        .name.split("-")[1]
        .removesuffix(".dist")
        for name in ("torch", "transformers", "accelerate")
    }
    return {"python": platform.python_version(), **ours, "trl": trl, **theirs}


def _page(content: dict[str, Any]) -> str:
    machine, versions = content["machine"], content["versions"]
    parts = [
        "# The race against TRL\n",
        f"{content['date']}, {machine['cpus']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, no GPU; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ".\n",
        "    python benchmarks/race_trl.py --repeat 4      # makes TRL's environment, start models, races, this page\n",
        SAME,
    ]
    for name, found in content["sizes"].items():
        parts.append(_section(SIZES[name], found))
    parts.append("`race_trl.json` has every step of every run.\n")
    return "\n".join(parts)


def _section(size: Size, found: dict[str, Any]) -> str:
    medians, runs = found["medians"], found["runs"]
    count = min(len(runs[side]) for side in SIDES)
    lines = [
        f"## {size.name}\n",
        f"{size.about[0].upper()}{size.about[1:]}. {size.num_prompts} prompts x {size.num_samples} answers a step; "
        f"medians of {count} runs a side, in turns; steady state begins after {size.warm_steps} steps.\n",
        "| | slime | TRL |",
        "|---|---|---|",
    ]
    for label, key, form in ROWS:
        cells = [_cell(medians[side].get(key), key, form) for side in SIDES]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    ratios = "; ".join(
        f"{key} {', '.join(f'{value:.2f}' for value in values)}"
        for key, values in found["ratios"].items()
    )
    lines += ["", f"TRL over slime, pair by pair: {ratios}.", ""]
    best = found["tuned"]["best"]
    tried = "; ".join(
        f"{side} {_words(choice)}: {choice['s_per_step']:.3f} s"
        for side in SIDES
        for choice in found["tuned"]["tried"][side]
    )
    lines += [
        f"Settings tried, seconds a step: {tried}. Chosen: slime {_words(best['slime'])}; TRL {_words(best['trl'])}.",
        "",
    ]
    if size.note:
        lines += [size.note, ""]
    lines += [f"![reward]({f'race_trl_{size.name}.svg'})", "", *_curve_rows(runs), ""]
    return "\n".join(lines)


def _words(setting: dict[str, float]) -> str:
    return ", ".join(f"{k} {v}" for k, v in setting.items() if k != "s_per_step")


def _cell(value: float | None, key: str, form: str) -> str:
    if value is None:
        return "not reached" if "goal" in key else "-"
    return form.format(value / 2**30 if key.endswith("bytes") else value)


def _curve_rows(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Rewards of every run, in at most 16 columns."""
    longest = max(len(run["rewards"]) for side in SIDES for run in runs[side])
    shown = sorted({round(i * (longest - 1) / 15) for i in range(16)})
    lines = ["| reward at step | " + " | ".join(str(i + 1) for i in shown) + " |"]
    lines.append("|---|" + "---|" * len(shown))
    for side in SIDES:
        for run in runs[side]:
            values = [f"{run['rewards'][i]:.2f}" if i < len(run["rewards"]) else "" for i in shown]
            lines.append(f"| {side}, seed {run['seed']} | " + " | ".join(values) + " |")
    return lines


def _curves(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Reward over seconds since the first step began, one line per run, as SVG."""
    end = max(sum(run["step_seconds"]) for side in SIDES for run in runs[side])
    panel = Panel(WIDTH, HEIGHT, longest=end)
    parts = panel.axes(0.9, f"{end:.0f} s since the first step began")
    for i, side in enumerate(SIDES):
        parts.append(text(MARGIN + 8 + 70 * i, 20, COLOURS[side], side))
        parts += [
            panel.line(
                zip(accumulate(run["step_seconds"]), run["rewards"], strict=True), COLOURS[side]
            )
            for run in runs[side]
        ]
    return picture(WIDTH, HEIGHT, parts)
