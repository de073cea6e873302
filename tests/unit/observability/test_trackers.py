import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from slime.observability.trackers import (
    JsonlTracker,
    TensorBoardTracker,
    Trackers,
    read_metrics,
    tensorboard_folder,
)


def test_a_line_holds_the_step_under_its_key_and_the_metrics(tmp_path: Path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({"train/loss": 0.5}, step_key="train/step", step=7)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row.pop("time") > 1.7e9
    assert row == {"train/step": 7, "train/loss": 0.5}
    tracker.close()


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for step in range(2):
        tracker = JsonlTracker(path)
        tracker.log({"train/loss": 1.0}, step_key="train/step", step=step)
        tracker.close()
    assert [row["train/step"] for row in read_metrics(path)] == [0, 1]


def test_numbers_json_lacks_survive_as_strict_json(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    values = {"a": math.nan, "b": math.inf, "c": -math.inf}
    tracker.log(values, step_key="train/step", step=0)
    tracker.close()

    def refuse(constant: str) -> float:
        raise ValueError(constant)

    json.loads(path.read_text(), parse_constant=refuse)
    row = read_metrics(path)[0]
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_a_line_cut_by_a_crash_is_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/step": 0}\n{"train/st')
    assert read_metrics(path) == [{"train/step": 0.0}]


def test_tensorboard_reads_what_was_logged(tmp_path: Path):
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    trackers = Trackers([TensorBoardTracker(tmp_path), JsonlTracker(tmp_path / "metrics.jsonl")])
    trackers.log({"train/loss": 0.5, "train/grad_norm": 2.0}, step_key="train/step", step=3)
    trackers.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    events = [e for e in LegacyEventFileLoader(str(path)).Load() if e.HasField("summary")]
    values = {value.tag: value.simple_value for event in events for value in event.summary.value}
    assert values == {"train/loss": 0.5, "train/grad_norm": 2.0}
    assert events[0].step == 3


def test_event_files_are_written_without_torch(tmp_path: Path):
    program = (
        "import sys, pathlib\n"
        "from slime.observability.trackers import TensorBoardTracker\n"
        "TensorBoardTracker(pathlib.Path(sys.argv[1])).close()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)


def test_tensorboard_folder_follows_the_environment_and_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    assert tensorboard_folder(tmp_path, None, None) == tmp_path
    monkeypatch.setenv("TENSORBOARD_DIR", "/elsewhere")
    assert tensorboard_folder(tmp_path, "letters", "seed0") == Path("/elsewhere/letters/seed0")


def _tensorboard_steps(folder: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_rounds_done_again_once(tmp_path: Path):
    first = TensorBoardTracker(tmp_path)
    for step in range(6):  # two optimizer steps a round
        first.log({"train/loss": 1.0}, step_key="train/step", step=step)
    for step in range(3):
        first.log({"rollout/raw_reward": 1.0}, step_key="rollout/step", step=step)
    first.log({"eval/held_out": 1.0}, step_key="eval/step", step=1)
    first.close()
    # Killed; the checkpoint is of round 0: rounds 1 and 2 come again.
    kept = [
        {"time": 5.0, "train/step": 0, "train/loss": 1.0},
        {"time": 5.0, "train/step": 1, "train/loss": 1.0},
        {"time": 6.0, "rollout/step": 0, "rollout/raw_reward": 1.0},
        {"time": 7.0, "eval/step": 1, "eval/held_out": 1.0},
    ]
    again = TensorBoardTracker(tmp_path, earlier=kept)
    again.log({"train/loss": 2.0}, step_key="train/step", step=2)
    again.log({"rollout/raw_reward": 2.0}, step_key="rollout/step", step=1)
    again.close()
    assert _tensorboard_steps(tmp_path) == {
        "train/loss": [0, 1, 2],
        "rollout/raw_reward": [0, 1],
        "eval/held_out": [1],
    }
