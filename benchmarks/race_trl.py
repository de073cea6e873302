"""A race against TRL's GRPOTrainer: same model, task, batch, steps and two cores; paired, repeated.

    python benchmarks/race_trl.py [--size quickstart|heavy] [--repeat 2] [--steps N]
        [--stage env|start|tune|race|report] [--folder .race/runs]

Stages, all of them by default; each one does only what its folder lacks, so a race that was
interrupted goes on (--fresh runs the races anew):
  env     .race/venv with TRL, from benchmarks/race_requirements.txt, by uv
  start   per size: data, random model, slime's SFT stage; both sides start from its checkpoint
  tune    per size: short runs that choose threads, ranks and micro-batch of each side
  race    per size: slime, TRL, slime, TRL, ...; each pair has a seed of its own
  report  benchmarks/results/race_trl.json, race_trl.md and race_trl_{size}.svg

Prints the JSON. Nothing else may run on the machine meanwhile.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from race.measure import run, slime_course, summary, trl_course
from race.report import write_report
from race.sizes import (
    ROOT,
    SIZES,
    VENV,
    Size,
    environment,
    make_start,
    slime_command,
    trl_command,
)

REQUIREMENTS = ROOT / "benchmarks" / "race_requirements.txt"
STAGES = ("env", "start", "tune", "race", "report")
Setting = dict[str, int]


def make_env() -> None:
    """.race/venv as the requirements say."""
    stamp, wanted = VENV / "race_stamp", hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("race_trl.py makes TRL's environment with uv, and there is none: pip install uv")
    subprocess.run(
        [uv, "venv", "--clear", "--quiet", "--python", sys.executable, str(VENV)], check=True
    )
    python = str(VENV / "bin" / "python")
    command = [uv, "pip", "install", "--quiet", "--python", python, "-r", str(REQUIREMENTS)]
    subprocess.run(command, check=True)
    # Compile what it imports: the first run would pay for it.
    subprocess.run(
        [python, "-W", "ignore", "-c", "import trl, datasets; from trl import GRPOTrainer"],
        check=True,
    )
    stamp.write_text(wanted)


def settings(size: Size) -> dict[str, list[Setting]]:
    """What each side may choose from on two cores."""
    return {
        # Engines have one thread each; `threads` are the trainer's.
        "slime": [
            {"threads": 1, "ranks": 1},
            {"threads": 2, "ranks": 1},
            {"threads": 1, "ranks": 2},
        ],
        "trl": [
            {"threads": threads, "micro_batch": micro}
            for threads in (1, 2)
            for micro in size.trl_micro_batches
        ],
    }


def one_run(
    size: Size, side: str, setting: Setting, out: Path, *, steps: int, seed: int
) -> dict[str, Any]:
    """Numbers of one run of one side; those on disk if it was made before."""
    done = out / "summary.json"
    if done.exists():
        return json.loads(done.read_text())
    shutil.rmtree(out, ignore_errors=True)
    start = out.parents[1] / "start"
    say(f"{size.name}: {side} {setting} {steps} steps, seed {seed} -> {out}")
    if side == "slime":
        command = slime_command(
            size, start, out / "run", ranks=setting["ranks"], steps=steps, seed=seed
        )
    else:
        command = trl_command(
            size, start, out / "run", micro_batch=setting["micro_batch"], steps=steps, seed=seed
        )
    began, usages = run(command, environment(setting["threads"]), out / "log.txt", ROOT)
    course = (slime_course if side == "slime" else trl_course)(began, out / "run")
    result = summary(
        course,
        usages,
        batch=size.batch,
        warm_steps=size.warm_steps if steps > size.warm_steps + 1 else 1,
    )
    result |= {"setting": setting, "seed": seed, "load_at_end": os.getloadavg()[0]}
    done.write_text(json.dumps(result, indent=1))
    shutil.rmtree(out / "run" / "checkpoints", ignore_errors=True)
    return result


def tune(size: Size, folder: Path) -> dict[str, Setting]:
    """The fastest setting of each side, by the median step of a short run each."""
    path = folder / size.name / "tuned.json"
    if path.exists():
        return json.loads(path.read_text())["best"]
    best: dict[str, Setting] = {}
    tried: dict[str, list[Any]] = {}
    for side, choices in settings(size).items():
        results = [
            one_run(
                size,
                side,
                choice,
                folder / size.name / "tune" / f"{side}{i}",
                steps=size.tune_steps,
                seed=0,
            )
            for i, choice in enumerate(choices)
        ]
        tried[side] = [{**r["setting"], "s_per_step": r["s_per_step_median"]} for r in results]
        best[side] = min(results, key=lambda r: r["s_per_step_median"])["setting"]
    path.write_text(json.dumps({"best": best, "tried": tried}, indent=1))
    return best


def race(size: Size, folder: Path, *, repeat: int, steps: int | None) -> None:
    """`repeat` pairs; the sides take turns."""
    best = tune(size, folder)
    for number in range(repeat):
        for side in ("slime", "trl"):
            out = folder / size.name / "race" / f"{number}-{side}"
            one_run(size, side, best[side], out, steps=steps or size.num_steps, seed=number)


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"race: {text}\n")


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=[*SIZES, "both"], default="both")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--steps", type=int, help="fewer steps than the size has")
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--folder", type=Path, default=ROOT / ".race" / "runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--fresh", action="store_true", help="forget earlier races, keep env and start"
    )
    options = parser.parse_args()
    sizes = [size for name, size in SIZES.items() if options.size in (name, "both")]
    if "env" in options.stage:
        make_env()
    for size in sizes:
        home = options.folder / size.name
        if options.fresh:
            for name in ("tune", "race"):
                shutil.rmtree(home / name, ignore_errors=True)
            (home / "tuned.json").unlink(missing_ok=True)
        if "start" in options.stage:
            make_start(size, options.folder)
        if "tune" in options.stage:
            tune(size, options.folder)
        if "race" in options.stage:
            race(size, options.folder, repeat=options.repeat, steps=options.steps)
    if "report" in options.stage:
        result = write_report(options.folder, options.results)
        sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
