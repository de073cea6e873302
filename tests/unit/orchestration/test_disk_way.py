"""Ranks around a version that rank 0 writes; ranks are threads here."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.config_argv import base_argv

from slime.cli.parse import load_config
from slime.engines.control import EngineControl
from slime.engines.protocol import PauseMode
from slime.errors import WeightSyncError
from slime.orchestration.disk_way import Hook, WayOverDisk, make_versions
from slime.weights.delta_versions import DeltaVersions
from slime.weights.sync import SyncReport
from slime.weights.versions import WholeVersions

SIZE = 3


class FakeTransport:
    """Writes nothing; says when it would."""

    def __init__(self, fails: str | None = None) -> None:
        self.fails = fails
        self.loaded: list[str] = []

    def sync(self, named: Any, version: str, *, written: Callable[[Path], None], **_: Any) -> Any:
        assert [name for name, _ in named] == ["a"]
        if self.fails:
            raise WeightSyncError(self.fails)
        written(Path(f"/versions/{version}"))
        self.loaded.append(version)
        return SyncReport(version)


def on_ranks(transport: FakeTransport, make_hook: Callable[[int], Hook | None]) -> list[Any]:
    """What `sync` returns on each rank, or its error."""
    barrier, slots = threading.Barrier(SIZE, timeout=20.0), [None] * SIZE

    def gather(rank: int, value: Any) -> list[Any]:
        slots[rank] = value
        barrier.wait()
        values = list(slots)
        barrier.wait()
        return values

    def run(rank: int) -> Any:
        way = WayOverDisk(
            EngineControl(("http://engine",), timeout_s=1.0),
            transport if rank == 0 else None,  # pyright: ignore[reportArgumentType]
            verify=True,
            pause_mode=PauseMode.ABORT,
            resumes=True,
            hook=make_hook(rank),
            args="args",
            gather=lambda value: gather(rank, value),
        )
        way.begin()
        try:
            return way.sync([("a", torch.ones(1))], "7")
        except WeightSyncError as error:
            way.failed(error)
            return str(error)

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(run, range(SIZE)))


def test_every_rank_calls_the_hook_before_engines_load() -> None:
    transport, calls = FakeTransport(), []
    lock = threading.Lock()

    def make(rank: int) -> Hook:
        def hook(args: Any, version_dir: str, engines: Any) -> None:
            with lock:
                calls.append((rank, args, version_dir, engines, list(transport.loaded)))

        return hook

    reports = on_ranks(transport, make)
    assert isinstance(reports[0], SyncReport)
    assert reports[1:] == [None, None]
    given = ("args", "/versions/7", ("http://engine",), [])
    assert sorted(calls) == [(rank, *given) for rank in range(SIZE)]


@pytest.mark.parametrize("rank_that_fails", range(SIZE))
def test_a_hook_that_fails_on_one_rank_fails_all_before_engines_load(rank_that_fails: int) -> None:
    transport = FakeTransport()

    def make(rank: int) -> Hook:
        def hook(*_: Any) -> None:
            if rank == rank_that_fails:
                raise OSError("no such host")

        return hook

    errors = on_ranks(transport, make)
    assert all(
        "post-write-path failed on /versions/7: OSError('no such host')" in e for e in errors
    )
    assert transport.loaded == []


def test_a_version_that_was_not_written_is_told_to_the_ranks_that_wait_for_it() -> None:
    calls: list[Any] = []
    errors = on_ranks(FakeTransport("the disk is full"), lambda rank: lambda *_: calls.append(rank))
    assert errors == ["the disk is full"] * SIZE
    assert calls == []


def test_flags_choose_what_is_written(tmp_path: Path) -> None:
    disk = {"update_weight_transport": "disk", "update_weight_disk_dir": str(tmp_path / "shared")}
    delta = {"update_weight_mode": "delta", "update_weight_local_checkpoint_dir": "/local"}
    assert make_versions(load_config(base_argv(tmp_path))) is None
    assert isinstance(make_versions(load_config(base_argv(tmp_path, **disk))), WholeVersions)
    found = make_versions(load_config(base_argv(tmp_path, **disk, **delta)))
    assert isinstance(found, DeltaVersions)
