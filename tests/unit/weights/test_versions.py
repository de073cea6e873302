"""Versions on disk: whole, named when they are, and what a full disk does."""

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slime.checkpoint import safetensors_file
from slime.checkpoint.hf import read_index_metadata
from slime.engines.checksum import checksum
from slime.errors import WeightSyncError
from slime.weights.delta_versions import DeltaVersions
from slime.weights.versions import METADATA, VersionFolder, Versions, WholeVersions, check_files


def weights(seed: int) -> dict[str, Tensor]:
    """Of which the second half of b is the same for all seeds."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(4, 6)
    b[:] = torch.arange(24.0).view(4, 6)
    b[:2] = torch.randn(2, 6, generator=generator)
    return {
        "a.weight": torch.randn(6, 8, generator=generator).bfloat16(),
        "b.weight": b,
        "c.weight": torch.ones(3),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Callable[..., VersionFolder]:
    def make(*, keeps: bool = False, patience_s: float = 0.0) -> VersionFolder:
        root = tmp_path / "versions"
        return VersionFolder(root, config_from=model, keeps=keeps, patience_s=patience_s)

    return make


def delta(folder: VersionFolder) -> DeltaVersions:
    return DeltaVersions(folder, encoding="xor", checksum="xxh3-128")


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_version_is_a_model_folder_with_checksums_in_its_index(folder, tmp_path: Path) -> None:
    version = WholeVersions(folder()).publish(weights(1).items(), "7")
    assert version.folder == tmp_path / "versions" / "weight_v000007"
    assert names(version.folder) == [
        "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    found = load_file(version.folder / "model.safetensors")
    assert {name: t.dtype for name, t in found.items()} == {
        name: t.dtype for name, t in weights(1).items()
    }
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(1).items())
    says = read_index_metadata(version.folder)[METADATA]
    assert says["version"] == "7"
    assert says["checksums"] == version.sums == {n: checksum(t) for n, t in weights(1).items()}
    check_files(version.folder, version.sums)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("make", [WholeVersions, delta])
def test_old_versions_go_when_the_engines_have_a_newer_one(folder, make, keeps: bool) -> None:
    place = folder(keeps=keeps)
    versions: Versions = make(place)
    (place.path / "weight_v000001_by_hand").mkdir(parents=True)  # not ours
    for number in ("1", "2", "3"):
        versions.publish(weights(int(number)).items(), number)
        versions.taken()
    kept = ["weight_v000001", "weight_v000002"] if keeps else []
    assert names(place.path) == [*kept[:1], "weight_v000001_by_hand", *kept[1:], "weight_v000003"]


@pytest.mark.parametrize("make", [WholeVersions, delta])
def test_a_version_is_written_once_and_never_with_other_weights(folder, make) -> None:
    versions: Versions = make(folder())
    first = versions.publish(weights(1).items(), "1")
    assert versions.publish(weights(1).items(), "1") is first
    with pytest.raises(WeightSyncError, match=r"version 1 was written already, .*a\.weight"):
        versions.publish(weights(2).items(), "1")


def test_the_second_version_has_what_changed_only(folder) -> None:
    versions = delta(folder())
    first = versions.publish(weights(1).items(), "1")
    assert first.density is None
    second = versions.publish(weights(2).items(), "2")
    assert sorted(load_file(second.folder / "model.safetensors")) == ["a.weight", "b.weight"]
    says = read_index_metadata(second.folder)[METADATA]
    assert (says["base_version"], says["version"]) == ("1", "2")
    assert (says["encoding"], says["compression"], says["checksum"]) == ("xor", "zstd", "xxh3-128")
    assert second.density is not None
    # a has 96 bytes, b 96 of which 48 may change, c 12.
    assert 0.3 < second.density <= (96 + 48) / 204
    assert second.sums == {name: checksum(tensor) for name, tensor in weights(2).items()}
    same = versions.publish(weights(2).items(), "3")
    assert same.density == 0.0
    assert read_index_metadata(same.folder)[METADATA]["checksums"] == {}


def test_a_whole_one_is_made_of_any_version_when_asked(folder) -> None:
    versions = delta(folder())
    first = versions.publish(weights(1).items(), "1")
    assert versions.whole() == first.folder
    second = versions.publish(weights(2).items(), "2")
    whole = versions.whole()
    assert whole.name == "weight_v000002-whole"
    check_files(whole, second.sums)
    assert versions.whole() == whole


def test_weights_may_be_overwritten_as_soon_as_they_were_given(folder) -> None:
    def live(seed: int) -> Iterator[tuple[str, Tensor]]:
        memory = torch.empty(64)
        for name, tensor in weights(seed).items():
            view = memory[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            yield name, view

    versions = delta(folder())
    for number in ("1", "2"):
        version = versions.publish(live(int(number)), number)
        expected = {name: checksum(tensor.float()) for name, tensor in weights(int(number)).items()}
        assert version.sums == expected
    check_files(versions.whole(), expected)


class Disk:
    """Is full after so many bytes; the writer's own files only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 10**9
        self.tries = 0
        disk, open_file = self, Path.open

        def opened(path: Path, mode: str = "r", **words: Any) -> Any:
            file = open_file(path, mode, **words)
            return _Full(disk, file) if mode == "wb" and words.get("buffering") == 0 else file

        monkeypatch.setattr(safetensors_file.Path, "open", opened)


class _Full:
    def __init__(self, disk: Disk, file: Any) -> None:
        self._disk = disk
        self._file = file

    def write(self, data: memoryview) -> int:
        if not self._disk.room:
            self._disk.tries += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self._file.write(data[: self._disk.room])
        self._disk.room -= count
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("make", [WholeVersions, delta])
def test_a_disk_that_stays_full_is_said_in_words_and_leaves_no_version(
    folder, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, place = Disk(monkeypatch), folder()
    versions: Versions = make(place)
    disk.room = 100
    with pytest.raises(WeightSyncError, match=r"version 1 .*No space left on device; .*MiB free"):
        versions.publish(weights(1).items(), "1")
    assert names(place.path) == []
    disk.room = 10**9
    version = versions.publish(weights(1).items(), "1")  # the next try is a whole one
    assert version.density is None
    check_files(version.folder, version.sums)


def test_a_folder_that_cannot_be_made_is_said_in_words(folder) -> None:
    place = folder()
    place.path.write_text("a file")
    with pytest.raises(WeightSyncError, match=r"version 1 .*cannot write .*weight_v000001"):
        WholeVersions(place).publish(weights(1).items(), "1")


def test_an_older_version_goes_when_the_disk_is_full(folder, monkeypatch) -> None:
    disk, place = Disk(monkeypatch), folder()
    versions = WholeVersions(place)
    versions.publish(weights(1).items(), "1")
    real = place._remove_oldest

    def remove(*but: Path) -> bool:
        disk.room = 10**9
        return real(*but)

    monkeypatch.setattr(place, "_remove_oldest", remove)
    disk.room = 100
    version = versions.publish(weights(2).items(), "2")
    assert names(place.path) == ["weight_v000002"]
    check_files(version.folder, version.sums)


def test_a_writer_waits_for_room(folder, monkeypatch, caplog) -> None:
    disk = Disk(monkeypatch)
    monkeypatch.setattr("slime.weights.versions.POLL_S", 0.0)
    waits: list[int] = []

    def sleep(_: float) -> None:
        waits.append(disk.tries)
        if len(waits) == 3:
            disk.room = 10**9

    monkeypatch.setattr("slime.weights.versions.time.sleep", sleep)
    versions = WholeVersions(folder(patience_s=60.0))
    disk.room = 150  # in the middle of a tensor
    version = versions.publish(weights(1).items(), "1")
    assert waits == [1, 2, 3]
    check_files(version.folder, version.sums)
    assert "The run waits up to 60 s for room" in caplog.text


def test_damaged_files_are_found(folder) -> None:
    version = WholeVersions(folder()).publish(weights(1).items(), "1")
    file = version.folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightSyncError, match="reads back as something else"):
        check_files(version.folder, version.sums)
