"""Which way the weights of a rank go."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.config_argv import base_argv

from slime.cli.parse import load_config
from slime.config.config import Config
from slime.engines.checksum import checksums
from slime.engines.protocol import PauseMode
from slime.errors import ConfigError, WeightSyncError
from slime.orchestration.disk_way import WayOverDisk, make_versions
from slime.orchestration.train_actor import starts_like_engines
from slime.orchestration.ways import Way, WayToEngines, make_way, pause_mode
from slime.weights.transport import Bucket

URLS = ("http://127.0.0.1:9",)
SGLANG = Config(rollout_engine="sglang")


def config_of(tmp_path: Path, **changes: str | None) -> Config:
    config = load_config(base_argv(tmp_path, rollout_engine="sglang", **changes))
    return dataclasses.replace(config, device="cpu")


def way_of(config: Config, rank: int = 0, **changes: Any) -> Way | None:
    return make_way(
        config,
        URLS,
        rank=rank,
        host="127.0.0.1",
        has_same_weights=False,
        engines_are_away=False,
        **changes,
    )


def test_only_rank_0_sends_to_engines_on_other_slots(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    way = way_of(config)
    assert isinstance(way, WayToEngines)
    assert way.bucket_bytes == config.update_weight_buffer_size
    assert way.prove is None
    assert way_of(config, rank=1) is None
    way.control.close()


def test_through_files_other_ranks_take_part_when_there_is_a_hook(tmp_path: Path) -> None:
    disk = {"update_weight_transport": "disk", "update_weight_disk_dir": str(tmp_path / "shared")}
    config = config_of(tmp_path, **disk)
    assert isinstance(way_of(config, versions=make_versions(config)), WayOverDisk)
    assert way_of(config, rank=1) is None
    path = "support.sync_hooks.note_version"
    hooked = config_of(tmp_path, **disk, custom_update_weight_post_write_path=path)
    assert isinstance(way_of(hooked, rank=1), WayOverDisk)


def test_requests_may_run_on_through_a_sync_on_shared_slots(tmp_path: Path) -> None:
    stay = {"colocate": "", "no_offload_train": "", "no_offload_rollout": ""}
    kept = {"update_weight_pause_mode": "in_place", "sglang_disable_radix_cache": ""}
    for flags, mode in ({}, PauseMode.ABORT), (kept, PauseMode.IN_PLACE):
        way = way_of(config_of(tmp_path, **stay, **flags))
        assert isinstance(way, WayToEngines)
        assert way.pause_mode is mode


class FakeEngines:
    """Take what they are sent; nobody is there."""

    urls = URLS
    timeout_s = 1.0
    depth = 1

    def __init__(self) -> None:
        self.events: list[str] = []

    def pause(self, mode: str) -> None:
        self.events.append("pause")

    def resume(self) -> None:
        self.events.append("resume")

    def close(self) -> None: ...

    def open(self) -> None: ...

    def start(self, bucket: Bucket, version: str | None = None) -> None:
        self._bucket = bucket
        self.events.append(f"bucket of {version}")

    def taken(self) -> Sequence[dict[str, int]]:
        sums = checksums(self._bucket.tensors)
        return [dict(zip(self._bucket.names, sums, strict=True))]

    def finish(self, version: str) -> None: ...


def test_engines_show_before_the_first_sync_that_tensors_bring_what_files_do() -> None:
    engines: Any = FakeEngines()
    way = WayToEngines(engines, engines, bucket_bytes=1000)
    way.prove = lambda: engines.events.append("proof")
    for version in ("1", "2"):
        way.begin()
        way.sync([("a", torch.ones(3))], version)
    one, two = (["pause", f"bucket of {version}", "resume"] for version in ("1", "2"))
    assert engines.events == ["proof", *one, *two]


def test_without_the_proof_nothing_is_sent() -> None:
    engines: Any = FakeEngines()
    way = WayToEngines(engines, engines, bucket_bytes=1000)

    def fail() -> None:
        raise WeightSyncError("parameters differ")

    way.prove = fail
    for _ in range(2):
        with pytest.raises(WeightSyncError, match="parameters differ"):
            way.sync([("a", torch.ones(3))], "1")
    assert engines.events == []


def test_only_sglang_has_to_show_it(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    way = way_of(config, unproven="/fp8")
    assert isinstance(way, WayToEngines)
    assert way.prove is not None
    embedded = way_of(dataclasses.replace(config, rollout_engine="embedded"), unproven="/fp8")
    assert isinstance(embedded, WayToEngines)
    assert embedded.prove is None


def test_weights_in_8_bits_are_not_what_the_trainer_starts_from(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert starts_like_engines(config)
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"quantization_config": {"quant_method": "fp8"}}))
    assert not starts_like_engines(config)


def test_each_engine_pauses_in_the_way_that_is_exact_there() -> None:
    assert pause_mode(Config(rollout_engine="embedded")) is PauseMode.RETRACT
    assert pause_mode(SGLANG) is PauseMode.ABORT
    in_place = Config(rollout_engine="embedded", update_weight_pause_mode="in_place")
    assert pause_mode(in_place) is PauseMode.IN_PLACE


def test_a_device_that_turns_out_to_be_a_gpu_is_checked_too() -> None:
    config = Config(device="auto", update_weight_pause_mode="retract")
    found = dataclasses.replace(config, device="cuda")
    with pytest.raises(ConfigError, match="--sglang-disable-radix-cache"):
        pause_mode(found)
    without_cache = dataclasses.replace(found, sglang_argv={"disable_radix_cache": True})
    assert pause_mode(without_cache) is PauseMode.RETRACT
