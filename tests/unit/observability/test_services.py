"""W&B and trackio: what they are told, with the real packages where they are installed."""

import json
import logging
import sqlite3
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.wandb_file import read_records

from slime.config.config import Config
from slime.errors import ConfigError
from slime.observability import services
from slime.observability.services import open_services
from slime.observability.trackers import MAX_FAILURES, Guarded
from slime.observability.wandb_tracker import WandbTracker


class FakeWandb(ModuleType):
    """Keeps what it is told."""

    class Settings(SimpleNamespace):
        model_fields = dict.fromkeys(("console", "x_disable_meta", "api_key", "base_url"))

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = SimpleNamespace(Error=RuntimeError)
        self.told: dict[str, Any] = {}
        self.metrics: list[tuple[str, str | None]] = []
        self.rows: list[dict[str, float]] = []

    def init(self, **told: Any) -> "FakeWandb":
        if told["mode"] == "online":
            raise self.errors.Error("no route to api.wandb.ai")
        self.told = told
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def finish(self) -> None: ...


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


class BrokenTracker:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, metrics: Mapping[str, float], *, step_key: str, step: int) -> None:
        self.calls += 1
        raise OSError("service is down")

    def close(self) -> None:
        raise OSError("service is down")


def test_a_tracker_that_fails_is_warned_of_once_and_then_left_out(
    caplog: pytest.LogCaptureFixture,
):
    broken = BrokenTracker()
    tracker = Guarded("wandb", broken)
    with caplog.at_level(logging.WARNING):
        for step in range(2 * MAX_FAILURES):
            tracker.log({"train/loss": 1.0}, step_key="train/step", step=step)
        tracker.close()
    assert broken.calls == MAX_FAILURES
    assert [record.getMessage() for record in caplog.records] == [
        "wandb does not take metrics (OSError('service is down')); the run goes on, "
        "metrics.jsonl stays complete, and this is said once"
    ]


def test_a_missing_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(services, "find_spec", lambda name: None)
    for flags, name in (({"use_wandb": True}, "wandb"), ({"use_trackio": True}, "trackio")):
        with pytest.raises(ConfigError, match=f"pip install {name}"):
            open_services(Config(**flags), tmp_path)
    assert open_services(Config(), tmp_path) == []


def test_each_area_has_its_own_axis(fake_wandb: FakeWandb, tmp_path: Path):
    tracker = WandbTracker(Config(), tmp_path)
    assert ("train/*", "train/step") in fake_wandb.metrics
    assert ("rollout/*", "rollout/step") in fake_wandb.metrics
    assert ("perf/*", "rollout/step") in fake_wandb.metrics
    assert ("eval/*", "eval/step") in fake_wandb.metrics
    tracker.log({"eval/held_out": 0.5}, step_key="eval/step", step=4)
    assert fake_wandb.rows == [{"eval/held_out": 0.5, "eval/step": 4}]


def test_the_train_step_can_be_the_axis_of_all(fake_wandb: FakeWandb, tmp_path: Path):
    tracker = WandbTracker(Config(wandb_always_use_train_step=True), tmp_path)
    tracker.log({"train/loss": 0.5}, step_key="train/step", step=7)
    tracker.log({"rollout/raw_reward": 0.1}, step_key="rollout/step", step=3)
    assert fake_wandb.metrics == [("*", "train/step")]
    assert fake_wandb.rows[1] == {"rollout/raw_reward": 0.1, "rollout/step": 3, "train/step": 7}


def test_a_run_started_again_in_its_folder_goes_on_in_the_same_wandb_run(
    fake_wandb: FakeWandb, tmp_path: Path
):
    WandbTracker(Config(wandb_group="g"), tmp_path)
    first = fake_wandb.told
    WandbTracker(Config(wandb_group="g"), tmp_path)
    assert fake_wandb.told["id"] == first["id"]
    assert fake_wandb.told["resume"] == "allow"
    assert first["name"] == f"g_{first['id']}"
    WandbTracker(Config(wandb_run_id="mine", disable_wandb_random_suffix=True), tmp_path)
    assert (fake_wandb.told["id"], fake_wandb.told["name"]) == ("mine", tmp_path.name)


def test_the_key_is_told_to_wandb_alone(fake_wandb: FakeWandb, tmp_path: Path):
    WandbTracker(Config(wandb_key="s3cret", wandb_host="http://h"), tmp_path)
    settings = fake_wandb.told["settings"]
    assert (settings.api_key, settings.base_url) == ("s3cret", "http://h")
    assert settings.x_disable_meta is True  # its metadata would hold the command line
    assert "s3cret" not in json.dumps(fake_wandb.told["config"])
    assert "s3cret" not in Config(wandb_key="s3cret").to_json()


def test_a_service_that_refuses_stops_the_run_at_its_start(fake_wandb: FakeWandb, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no route to api.wandb.ai.*--wandb-mode offline"):
        WandbTracker(Config(wandb_mode="online"), tmp_path)


def test_real_wandb_writes_offline_what_it_was_told(tmp_path: Path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    key = "k3y" * 14
    config = Config(use_wandb=True, wandb_mode="offline", wandb_key=key)
    (tracker,) = open_services(config, tmp_path)
    tracker.log({"train/loss": 0.5}, step_key="train/step", step=7)
    tracker.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert key.encode() not in file.read_bytes()
    rows = [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in read_records(file)
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["train/loss"], row["train/step"]) for row in rows] == [("0.5", "7")]


def test_real_trackio_keeps_what_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "data"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    (tracker,) = open_services(Config(use_trackio=True), tmp_path)
    tracker.log({"train/loss": 0.5}, step_key="train/step", step=7)
    tracker.close()
    (file,) = (tmp_path / "data").glob("*.db")
    with sqlite3.connect(file) as database:
        ((step, metrics),) = database.execute("select step, metrics from metrics").fetchall()
    assert (step, json.loads(metrics)) == (7, {"train/loss": 0.5, "train/step": 7})
