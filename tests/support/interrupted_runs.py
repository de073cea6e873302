"""A training run that is killed and started again with the same command, and what it left."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.train_runs import MODEL_ARGS, QUICKSTART, ROOT
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from slime.observability.doctor import live_processes
from slime.observability.ledger import lineage, read_events
from slime.observability.ledger_audit import Audit, audit

TIMEOUT_S = 480.0
# Times and what depends on them; everything else is a function of seeds and weights.
# Nor do counts of what the engines found in their caches stay, which is up to who asked when.
_TIMED = (
    "perf/",
    "time",
    "rollout/avg_cached_tokens_per_sample",
    "rollout/prefix_cache_hit_rate",
)


@dataclass
class TrainingRun:
    """One run folder and the command that starts it; `start` may be called again and again."""

    folder: Path
    flags: list[str]
    script: str = "train.py"
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def start(self) -> None:
        """Start the command; its output goes to `output-{n}.txt` beside the folder."""
        self.starts += 1
        argv = [*MODEL_ARGS, "--device", "cpu", "--run-dir", str(self.folder), *self.flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = f"{QUICKSTART}{os.pathsep}{ROOT / 'tests'}"
        env.pop("RAY_ADDRESS", None)
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / self.script), *argv],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=env,
                cwd=self.folder.parent,
            )

    @property
    def output(self) -> Path:
        """What the latest start printed."""
        return self.folder.with_name(f"{self.folder.name}-output-{self.starts}.txt")

    def wait(self) -> int:
        """The exit code of the command."""
        assert self.process is not None
        return self.process.wait(TIMEOUT_S)

    def finish(self) -> None:
        """Start the command and let it come to its end."""
        self.start()
        code = self.wait()
        assert code == 0, self.output.read_text(errors="replace")[-3000:]

    def await_round(self, rollout_id: int) -> None:
        """Return once the row of a round is written; fails when the run ends before."""
        self._await(lambda: rollout_id in self._rounds(), f"round {rollout_id}")

    def await_checkpoint(self, beyond: int) -> None:
        """Return once there is a checkpoint after a round later than `beyond`."""
        self._await(lambda: self.checkpoint() > beyond, f"a checkpoint after {beyond}")

    def checkpoint(self) -> int:
        """The round of the latest checkpoint, or -1."""
        try:
            return int((self.folder / "ckpt" / "latest_checkpointed_iteration.txt").read_text())
        except (OSError, ValueError):
            return -1

    def kill(self, role: str) -> None:
        """SIGKILL to the process of this role; returns once the command has ended."""
        found = [note for note in live_processes(self.folder) if note.role == role]
        assert found, f"no {role} among {live_processes(self.folder)}"
        os.kill(found[0].pid, signal.SIGKILL)
        self.wait()

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl without what is measured by a clock."""
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in row.items() if not k.startswith(_TIMED)} for row in rows]

    def rounds(self) -> dict[int, tuple[Any, Any]]:
        """What counts of the ledger: per round its generated samples and its optimizer steps."""
        line = lineage(read_events(self.folder / "ledger.jsonl"))
        return {r: (line.rollouts[r], line.trains[r]) for r in sorted(line.rollouts)}

    def latest_rounds(self) -> dict[int, Any]:
        """The latest `rollout` event of each round, whether it counts or not."""
        events = read_events(self.folder / "ledger.jsonl")
        return {e["rollout_id"]: [e] for e in events if e["event"] == "rollout"}

    def generated(self) -> int:
        """The last round with a row of metrics."""
        return int(max(self._rounds(), default=-1))

    def audit(self) -> Audit:
        """The ledger's proof."""
        return audit(read_events(self.folder / "ledger.jsonl"))

    def final_state(self) -> dict[str, str]:
        """A digest of every tensor of the last checkpoint: weights, moments, random state."""
        target = self.folder / f"final-{self.starts}.pt"
        dcp_to_torch_save(self.folder / "ckpt" / f"iter_{self.checkpoint():07d}", target)
        return dict(_digests("", torch.load(target, weights_only=False)))

    def _rounds(self) -> set[int]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return {row["rollout/step"] for row in map(_json, lines) if "rollout/step" in row}

    def _await(self, holds: Any, what: str) -> None:
        assert self.process is not None
        deadline = time.monotonic() + TIMEOUT_S
        while not holds():
            assert self.process.poll() is None, self.output.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, f"no {what} after {TIMEOUT_S} s"
            time.sleep(0.02)


def _json(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:  # being written
        return {}


def _digests(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(torch.uint8) if value.dim() else value
        content = data.numpy().tobytes() if value.numel() else b""
        yield name, f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _digests(f"{name}/{key}", item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _digests(f"{name}/{number}", item)
    elif isinstance(value, bool | int | float | str):
        yield name, repr(value)


def finish_through_kills(run: TrainingRun) -> None:
    """Come to the end through three kills: of each process, at a random moment after a checkpoint."""
    moments = random.Random(time.time_ns())
    for role in ("driver", "rollout manager", "train rank 0"):
        run.start()
        run.await_checkpoint(beyond=run.checkpoint())
        # About a round: three kills and their checkpoints must fit into the run.
        time.sleep(moments.uniform(0.0, 0.4))
        run.kill(role)
    run.finish()
    assert run.audit().counts["attempts"] == 4


def assert_same_run(run: TrainingRun, undisturbed: TrainingRun) -> None:
    """Samples, optimizer steps, metrics, weights and optimizer state are equal bit for bit."""
    assert run.rounds() == undisturbed.rounds()
    assert run.metrics() == undisturbed.metrics()
    ours, theirs = run.final_state(), undisturbed.final_state()
    differing = [name for name in theirs if ours.get(name) != theirs[name]]
    assert sorted(ours) == sorted(theirs)
    # The saved flags have the folders in them.
    assert [name for name in differing if not name.startswith("/args")] == []
    assert run.audit().problems == ()
