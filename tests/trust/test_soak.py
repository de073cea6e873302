"""The quickstart's GRPO stage while its engines and its router are killed at random moments.

`make test-trust` runs it. It ends with the rewards of a run that nobody disturbs, bit for bit.
`SLIME_SOAK_KILLS` and `SLIME_SOAK_ROLLOUTS` make it shorter, `SLIME_TRUST_SEED` repeats a schedule;
the result goes to `soak.json` in `SLIME_TRUST_OUT`.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.quickstart_argv import QUICKSTART, ROOT, Quickstart, changed, make_quickstart
from support.soak import Kill, Killer, recovery_times

from slime.observability.ledger import read_events
from slime.observability.ledger_audit import Audit, audit
from slime.observability.trackers import read_metrics

NUM_KILLS = int(os.environ.get("SLIME_SOAK_KILLS", "30"))
NUM_ROLLOUTS = int(os.environ.get("SLIME_SOAK_ROLLOUTS", "60"))
SEED = int(os.environ.get("SLIME_TRUST_SEED", "0"))
DELAY_S = (0.0, 0.8)  # about a round
TIMEOUT_S = 900.0
# What the engines found in their caches is up to who asked when: no result, and no bit of one.
CACHES = ("rollout/avg_cached_tokens_per_sample", "rollout/prefix_cache_hit_rate")
RESTARTS = ("rollout/engine_restarts", "rollout/router_restarts")

pytestmark = pytest.mark.trust


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """The quickstart after its first stage."""
    made = make_quickstart(tmp_path_factory.mktemp("soak"))
    data = [sys.executable, str(QUICKSTART / "middle_letter.py"), str(made.path / "data")]
    subprocess.run(data, check=True)
    _wait(_start(list(made.sft), made.path / "sft.txt"), made.path / "sft.txt")
    return made


def test_a_run_whose_servers_are_killed_again_and_again_learns_the_same(
    quickstart: Quickstart,
) -> None:
    calm, calm_s, _ = _grpo(quickstart, "calm", num_kills=0)
    stormy, stormy_s, kills = _grpo(quickstart, "stormy", num_kills=NUM_KILLS)
    times = recovery_times(stormy / "logs" / "rollout-manager.log", kills)
    result = {
        "rollouts": NUM_ROLLOUTS,
        "seed": SEED,
        "kills": len(kills),
        "killed_engines": sum(kill.target == "engine" for kill in kills),
        "killed_routers": sum(kill.target == "router" for kill in kills),
        "final_reward_undisturbed": _rewards(calm)[-1],
        "final_reward": _rewards(stormy)[-1],
        "rewards_bit_equal": _rewards(calm) == _rewards(stormy),
        "metrics_bit_equal": _metrics(calm) == _metrics(stormy),
        "ledger_problems": _audit(stormy).problems,
        "ledger": _audit(stormy).counts,
        "seconds_undisturbed": round(calm_s, 1),
        "seconds": round(stormy_s, 1),
        "recovery_s": _summary(times),
    }
    _report(result)
    assert len(kills) == NUM_KILLS
    assert result["rewards_bit_equal"]
    assert result["metrics_bit_equal"]
    assert result["ledger_problems"] == ()


def _grpo(made: Quickstart, name: str, *, num_kills: int) -> tuple[Path, float, list[Kill]]:
    """(run folder, seconds, kills) of the second stage."""
    folder, output = made.path / name, made.path / f"{name}.txt"
    argv = changed(
        made.grpo, run_dir=str(folder), save=None, save_hf=None, num_rollout=str(NUM_ROLLOUTS)
    )
    started = time.monotonic()
    process = _start(argv, output)
    killer = Killer(
        process,
        metrics=folder / "metrics.jsonl",
        router_port=_router_port(folder, process, output) if num_kills else 0,
        num_kills=num_kills,
        rounds_per_kill=NUM_ROLLOUTS / num_kills if num_kills else 0.0,
        delay_s=DELAY_S,
        seed=SEED,
    )
    killer.start()
    _wait(process, output)
    killer.join(TIMEOUT_S)
    return folder, time.monotonic() - started, killer.kills


def _start(argv: list[str], output: Path) -> "subprocess.Popen[bytes]":
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(QUICKSTART)}
    env.pop("RAY_ADDRESS", None)
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *argv], stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT
        )


def _wait(process: "subprocess.Popen[bytes]", output: Path) -> None:
    try:
        code = process.wait(TIMEOUT_S)
    finally:
        process.kill()
    assert code == 0, output.read_text(errors="replace")[-4000:]


def _router_port(folder: Path, process: "subprocess.Popen[bytes]", output: Path) -> int:
    """The router's port, once the first round has begun."""
    log, deadline = folder / "logs" / "rollout-manager.log", time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        text = log.read_text() if log.is_file() else ""
        if (found := re.search(r"router http://[^ ]*:(\d+) in front", text)) and (
            folder / "metrics.jsonl"
        ).is_file():
            return int(found[1])
        time.sleep(0.1)
    raise AssertionError(output.read_text(errors="replace")[-4000:])


def _audit(folder: Path) -> Audit:
    return audit(read_events(folder / "ledger.jsonl"))


def _rewards(folder: Path) -> list[float]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [row["rollout/raw_reward"] for row in rows if "rollout/raw_reward" in row]


def _metrics(folder: Path) -> list[dict[str, float]]:
    return [
        {
            k: v
            for k, v in row.items()
            if not k.startswith(("perf/", "time")) and k not in (*RESTARTS, *CACHES)
        }
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def _summary(times: list[float | None]) -> dict[str, Any]:
    known = sorted(seconds for seconds in times if seconds is not None)
    return {
        "median": round(statistics.median(known), 2) if known else None,
        "max": round(known[-1], 2) if known else None,
        "not_before_the_end": len(times) - len(known),
        "each": [None if seconds is None else round(seconds, 2) for seconds in times],
    }


def _report(result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if folder := os.environ.get("SLIME_TRUST_OUT"):
        (Path(folder) / "soak.json").write_text(text + "\n")
