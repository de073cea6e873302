"""Weights through files into SGLang; the servers are fakes that load safetensors and run our receiver for real."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from support.fake_sglang import Engines, FakeSGLang, assert_holds, serving
from torch import Tensor

from slime.engines.control import EngineControl
from slime.engines.protocol import PauseMode
from slime.errors import EngineUnavailable, WeightSyncError
from slime.weights.delta_versions import DeltaVersions
from slime.weights.disk import DiskTransport, prove_tensors
from slime.weights.local_copy import Stale, bring
from slime.weights.sync import SyncReport
from slime.weights.versions import VersionFolder, Versions, WholeVersions

SHAPES = {"model.norm.weight": (6,), "model.embed.weight": (31, 8), "lm_head.weight": (31, 8)}


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def fakes() -> Iterator[Engines]:
    engines = Engines()
    yield engines
    engines.end()


@pytest.fixture
def folder(tmp_path: Path) -> VersionFolder:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"dtype": "float32"}))
    path = tmp_path / "versions"
    return VersionFolder(path, config_from=tmp_path / "model", keeps=False, patience_s=0.0)


class LocalCopies:
    """Of hosts that are folders here."""

    def __init__(self, *folders: Path) -> None:
        self.folders = folders
        self.local_dir = str(folders[0])

    def bring(self, version: Path) -> list[str]:
        stale: list[str] = []
        for folder in self.folders:
            try:
                bring(version, folder)
            except Stale as reason:
                stale.append(str(reason))
        return stale

    def close(self) -> None:
        pass


@contextmanager
def transport_to(
    *engines: FakeSGLang, versions: Versions, copies: LocalCopies | None = None
) -> Iterator[tuple[EngineControl, DiskTransport]]:
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(engine)).url for engine in engines]
        control = EngineControl(urls, timeout_s=20.0)
        transport = DiskTransport(
            control, versions, copies=copies, host="127.0.0.1", timeout_s=20.0
        )
        transport.open()
        yield control, transport
        transport.close()
        control.close()


def sync(
    transport: DiskTransport,
    content: dict[str, Tensor],
    version: str,
    written: Callable[[Path], None] = lambda folder: None,
) -> SyncReport:
    return transport.sync(
        content.items(), version, verify=True, pause_mode=PauseMode.ABORT, written=written
    )


def test_every_rank_of_every_engine_loads_every_version(fakes: Engines, folder) -> None:
    old = (weights(0),)
    engines = fakes.make([old, old], [old])
    with transport_to(*engines, versions=WholeVersions(folder)) as (_, transport):
        for seed in (1, 2):
            report = sync(transport, weights(seed), str(seed))
            assert_holds(engines, weights(seed))
            assert [one.version for one in engines] == [str(seed)] * 2
            assert report.verified_by == "receivers"
            assert report.digest
            assert report.num_tensors == 3
    assert [path.name for path in folder.path.iterdir()] == ["weight_v000002"]
    order = [path for path in engines[0].paths if "version" not in path]
    assert order[:5] == [
        "/abort_request", "/pause_generation", "/update_weights_from_disk",
        "/update_weights_from_tensor", "/continue_generation",
    ]  # fmt: skip


def test_engines_generate_while_a_version_is_written(fakes: Engines, folder) -> None:
    (engine,) = engines = fakes.make([(weights(0),)])
    seen: list[tuple[str, list[str]]] = []
    with transport_to(*engines, versions=WholeVersions(folder)) as (_, transport):
        sync(transport, weights(1), "1", lambda path: seen.append((path.name, list(engine.paths))))
    assert seen == [("weight_v000001", [])]


def test_copies_on_hosts_follow_what_changed(fakes: Engines, folder, tmp_path: Path) -> None:
    engines = fakes.make([(weights(0),)])
    versions = DeltaVersions(folder, encoding="overwrite", checksum="xxh3-128")
    copies = LocalCopies(tmp_path / "host")
    with transport_to(*engines, versions=versions, copies=copies) as (_, transport):
        first = sync(transport, weights(1), "1")
        changed = weights(1) | {"model.norm.weight": weights(2)["model.norm.weight"]}
        second = sync(transport, changed, "2")
        assert_holds(engines, changed)
    assert first.density is None
    assert second.density is not None
    assert 0 < second.density <= 6 / (6 + 2 * 31 * 8)
    assert second.metrics()["perf/update_weights_density"] == second.density
    # An engine that comes back finds its host as it should be; on a new host a whole version is made.
    (other,) = fakes.make([(weights(0),)])
    copies = LocalCopies(tmp_path / "new host", tmp_path / "host")
    with transport_to(other, versions=versions, copies=copies) as (_, transport):
        sync(transport, changed, "2")
        assert_holds([other], changed)
    assert (folder.path / "weight_v000002-whole").is_dir()


def test_an_engine_that_makes_something_else_of_the_files_is_named(fakes: Engines, folder) -> None:
    engines = fakes.make([(weights(0),)])
    engines[0].damages = "lm_head.weight"
    with transport_to(*engines, versions=WholeVersions(folder)) as (_, transport):
        with pytest.raises(WeightSyncError, match=r"1 of its parameters differ: lm_head_weight"):
            sync(transport, weights(1), "1")
        assert engines[0].version == "default"
        assert "/continue_generation" not in engines[0].paths


def test_a_checkpoint_proves_that_tensors_bring_what_files_do(fakes: Engines, folder) -> None:
    engines = fakes.make([(weights(0),)])
    checkpoint = WholeVersions(folder).publish(weights(1).items(), "1").folder
    with transport_to(*engines, versions=WholeVersions(folder)) as (control, _):
        prove_tensors(control, checkpoint, host="127.0.0.1", timeout_s=20.0)
        assert_holds(engines, weights(1))
        engines[0].damages = "lm_head.weight"
        with pytest.raises(WeightSyncError, match=r"lm_head_weight.*give the bf16 model"):
            prove_tensors(control, checkpoint, host="127.0.0.1", timeout_s=20.0)


def test_files_that_an_engines_host_sees_otherwise_are_named(
    fakes: Engines, folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = fakes.make([(weights(0),)])
    versions = WholeVersions(folder)
    with transport_to(*engines, versions=versions) as (_, transport):

        def damage(path: Path) -> None:
            file = path / "model.safetensors"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)

        with pytest.raises(WeightSyncError, match="does not hold the weights it was sent"):
            sync(transport, weights(1), "1", damage)


def test_an_engine_without_a_receiver_has_its_files_read_back(
    fakes: Engines, folder, caplog
) -> None:
    engines = fakes.make([(weights(0),)])
    engines[0].loaders = []
    with transport_to(*engines, versions=WholeVersions(folder)) as (_, transport):
        report = sync(transport, weights(1), "1")
        assert_holds(engines, weights(1))
    assert report.verified_by == "files"
    assert "/update_weights_from_tensor" not in engines[0].paths
    assert "engines without slime's receiver" in caplog.text


def test_what_fails_before_the_pause_leaves_the_engines_alone(fakes: Engines, folder) -> None:
    engines = fakes.make([(weights(0),)])

    def no_room(path: Path) -> None:
        raise WeightSyncError("the hook failed")

    with transport_to(*engines, versions=WholeVersions(folder)) as (_, transport):
        with pytest.raises(WeightSyncError, match="the hook failed"):
            sync(transport, weights(1), "1", no_room)
        assert engines[0].paths == []


def test_an_engine_that_cannot_load_a_version_stays_paused(fakes: Engines, folder) -> None:
    engines = fakes.make([(weights(0),)], breaks=True)
    with transport_to(*engines, versions=WholeVersions(folder)) as (_, transport):
        with pytest.raises(WeightSyncError, match=r"is gone.*Do all engines' hosts see .*weight_v"):
            sync(transport, weights(1), "1")
        assert "/continue_generation" not in engines[0].paths


def test_a_dead_engine_is_named_at_once(folder) -> None:
    control = EngineControl(["http://127.0.0.1:9"], timeout_s=20.0)
    transport = DiskTransport(control, WholeVersions(folder), host="127.0.0.1", timeout_s=20.0)
    with pytest.raises(EngineUnavailable, match=r"127\.0\.0\.1:9"):
        transport.open()
    control.close()
