"""The copy of the weights on an engine's host."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slime.checkpoint.hf import read_index_metadata
from slime.errors import CheckpointError
from slime.weights import local_copy
from slime.weights.delta import Checksum, Encoding
from slime.weights.delta_versions import DeltaVersions
from slime.weights.local_copy import Stale, bring, copy_path
from slime.weights.versions import VersionFolder, check_files


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(3 + i, 5, generator=generator).bfloat16() for i in range(6)}


@pytest.fixture
def versions(tmp_path: Path) -> DeltaVersions:
    return make_versions(tmp_path)


def make_versions(
    tmp_path: Path, encoding: Encoding = "xor", checksum: Checksum = "xxh3-128"
) -> DeltaVersions:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    folder = VersionFolder(tmp_path / "shared", config_from=model, keeps=True, patience_s=0.0)
    return DeltaVersions(folder, encoding=encoding, checksum=checksum)


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
@pytest.mark.parametrize("checksum", ["xxh3-128", "blake3", "adler32"])
def test_a_copy_follows_every_version(tmp_path: Path, encoding, checksum) -> None:
    versions, local = make_versions(tmp_path, encoding, checksum), tmp_path / "local"
    for number in (1, 2, 3):
        version = versions.publish(weights(number).items(), str(number))
        bring(version.folder, local)
        bring(version.folder, local)  # another engine of the host
        check_files(copy_path(local), version.sums)
    assert (copy_path(local) / "config.json").is_file()
    assert not list(local.glob("*.partial"))


def test_only_what_changed_is_written(tmp_path: Path, versions: DeltaVersions, monkeypatch) -> None:
    local, places = tmp_path / "local", []
    first = weights(1)
    bring(versions.publish(first.items(), "1").folder, local)
    real = local_copy._write
    monkeypatch.setattr(
        local_copy,
        "_write",
        lambda handle, data, at: (places.append(len(data)), real(handle, data, at)),
    )
    second = first | {"w3": first["w3"] + 1}
    version = versions.publish(second.items(), "2")
    bring(version.folder, local)
    assert places == [first["w3"].nbytes]
    check_files(copy_path(local), version.sums)


def test_a_copy_that_missed_a_version_asks_for_a_whole_one(
    tmp_path: Path, versions: DeltaVersions
) -> None:
    local = tmp_path / "local"
    bring(versions.publish(weights(1).items(), "1").folder, local)
    versions.publish(weights(2).items(), "2")
    version = versions.publish(weights(3).items(), "3")
    with pytest.raises(Stale, match=r"is of version 1, .*not of version 2"):
        bring(version.folder, local)
    bring(versions.whole(), local)
    check_files(copy_path(local), version.sums)
    with pytest.raises(Stale, match="is of no version"):
        bring(version.folder, tmp_path / "new host")


def test_a_copy_of_another_run_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    local = tmp_path / "local"
    bring(make_versions(tmp_path).publish(weights(7).items(), "1").folder, local)
    versions = make_versions(tmp_path)
    first = versions.publish(weights(1).items(), "1")
    second = versions.publish(weights(2).items(), "2")
    with pytest.raises(Stale):
        bring(second.folder, local)
    bring(first.folder, local)  # a whole one replaces it
    bring(second.folder, local)
    check_files(copy_path(local), second.sums)


def test_a_tensor_that_does_not_become_the_trainers_is_noticed(
    tmp_path: Path, versions: DeltaVersions
) -> None:
    local = tmp_path / "local"
    bring(versions.publish(weights(1).items(), "1").folder, local)
    file = copy_path(local) / "model.safetensors"
    tensors = load_file(file)
    tensors["w2"][0, 0] += 1
    save_file(tensors, file)
    version = versions.publish(weights(2).items(), "2")
    with pytest.raises(Stale, match=r"w2 .* does not become what the trainer has"):
        bring(version.folder, local)
    # Half-changed as it is, it is of no version.
    with pytest.raises(Stale, match="is of no version"):
        bring(version.folder, local)
    bring(versions.whole(), local)
    check_files(copy_path(local), version.sums)


def test_an_interrupted_change_leaves_a_copy_of_no_version(
    tmp_path: Path, versions: DeltaVersions, monkeypatch
) -> None:
    local = tmp_path / "local"
    bring(versions.publish(weights(1).items(), "1").folder, local)
    version = versions.publish(weights(2).items(), "2")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local_copy, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            bring(version.folder, local)
    with pytest.raises(Stale, match="is of no version"):
        bring(version.folder, local)


def test_a_copy_from_before_a_restart_of_the_machine_is_not_trusted(
    tmp_path: Path, versions: DeltaVersions, monkeypatch
) -> None:
    local = tmp_path / "local"
    bring(versions.publish(weights(1).items(), "1").folder, local)
    boot = tmp_path / "boot_id"
    boot.write_text("another")
    monkeypatch.setattr(local_copy, "_BOOT_ID", boot)
    with pytest.raises(Stale):
        bring(versions.publish(weights(2).items(), "2").folder, local)


def test_a_folder_that_this_host_does_not_see_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"elsewhere is no version .* all hosts share\?"):
        bring(tmp_path / "elsewhere", tmp_path / "local")


def test_a_copy_that_cannot_be_written_is_said_in_words(
    tmp_path: Path, versions: DeltaVersions
) -> None:
    version = versions.publish(weights(1).items(), "1")
    (tmp_path / "local").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot write"):
        bring(version.folder, tmp_path / "local")


def test_the_index_of_a_change_tells_the_checksums_of_what_changed(
    versions: DeltaVersions,
) -> None:
    versions.publish(weights(1).items(), "1")
    changed = weights(1) | {"w0": weights(2)["w0"]}
    version = versions.publish(changed.items(), "2")
    assert list(read_index_metadata(version.folder)["slime"]["checksums"]) == ["w0"]
    index = json.loads((version.folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"w0": "model.safetensors"}
