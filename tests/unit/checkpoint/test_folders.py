"""Conversions of whole folders: bits, interruptions, and what does not fit."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.published_configs import MODEL_SCRIPTS
from support.tiny_families import FAMILIES, make_tiny_family, tiny_family_config

from slime.checkpoint import folders
from slime.checkpoint.dims import ModelDims
from slime.checkpoint.folders import hf_to_torch_dist, megatron_to_hf
from slime.checkpoint.hf import HfFolder
from slime.checkpoint.hf_writer import write_hf_folder
from slime.checkpoint.mapping import load_mapping
from slime.checkpoint.pieces import matrices
from slime.checkpoint.ranks import Ranks
from slime.checkpoint.torch_dist import TorchDistFolder
from slime.config.checkpoints import TRACKER_FILE
from slime.errors import CheckpointError

VOCAB = 106


def tensors_of(path: Path | str) -> dict[str, torch.Tensor]:
    with HfFolder(path) as folder:
        return {name: folder.tensor(name).clone() for name in folder.names()}


def assert_equal(found: Path | str, expected: Path | str) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_changes_no_bit(family: str, tmp_path: Path) -> None:
    model = make_tiny_family(tmp_path / "model", family, vocab_size=VOCAB)
    done = hf_to_torch_dist(model, tmp_path / "saved", padded_vocab_size=128)
    assert done == tmp_path / "saved" / "release"
    assert (tmp_path / "saved" / TRACKER_FILE).read_text() == "release"
    assert TorchDistFolder(done).shapes()["embedding.word_embeddings.weight"] == (128, 64)
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", origin=model, max_shard_bytes=200_000)
    assert_equal(tmp_path / "back", model)


@pytest.mark.parametrize("name", ["deepseek-v3", "glm4.5-355B-A32B", "qwen3-30B-A3B", "glm4-9B"])
def test_every_tensor_of_a_published_model_has_a_place_of_its_own(name: str) -> None:
    config = MODEL_SCRIPTS[name]
    dims = ModelDims.from_hf_config(config)
    places: set[Any] = set()
    numbers = 0
    for bound in load_mapping(config["model_type"]).parameters(dims):
        for _, pieces in matrices(bound, dims):
            for piece in pieces:
                at = (piece.place.key, piece.place.offsets(piece.offsets))
                assert at not in places, at
                places.add(at)
                size = piece.place.sizes(piece.sizes)
                assert len(size) == len(piece.place.shape(piece.whole))
                numbers += torch.Size(size).numel()
    on_disk = load_mapping(config["model_type"]).hf_parameters(dims).values()
    assert numbers == sum(torch.Size(shape).numel() for shape in on_disk)


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_family(tmp_path / "model", "qwen3", vocab_size=VOCAB)
    read: list[str] = []
    real = HfFolder.tensor

    def counting(self: HfFolder, name: str) -> torch.Tensor:
        read.append(name)
        if len(read) == 20:
            raise KeyboardInterrupt
        return real(self, name)

    monkeypatch.setattr(HfFolder, "tensor", counting)
    with pytest.raises(KeyboardInterrupt):
        hf_to_torch_dist(model, tmp_path / "saved")
    assert not (tmp_path / "saved" / "release").exists()
    before = len(read)
    hf_to_torch_dist(model, tmp_path / "saved")
    monkeypatch.undo()
    again = read[before:]
    assert "model.embed_tokens.weight" not in again
    assert len(again) < len(tensors_of(model))
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", origin=model)
    assert_equal(tmp_path / "back", model)


@pytest.mark.parametrize("same_path", [True, False])
def test_what_another_model_has_begun_is_not_taken_up(
    same_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Path(make_tiny_family(tmp_path / "first", "qwen3", vocab_size=VOCAB))
    second = tmp_path / "second"
    shifted = {name: tensor + 1 for name, tensor in tensors_of(first).items()}
    write_hf_folder(second, shifted.items(), config_from=first)
    verify, calls = folders.verify_section, iter(range(9))

    def failing(partial: Path, name: str) -> None:
        verify(partial, name)
        if next(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(folders, "verify_section", failing)
    with pytest.raises(KeyboardInterrupt):
        hf_to_torch_dist(first, tmp_path / "saved")
    monkeypatch.undo()
    if same_path:
        first.rename(tmp_path / "away")
        second = second.rename(first)
    done = hf_to_torch_dist(second, tmp_path / "saved")
    assert not (done / "resume.key").exists()
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", origin=second)
    assert_equal(tmp_path / "back", second)


def test_an_interrupted_way_back_goes_on_with_the_next_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_family(tmp_path / "model", "qwen3_moe", vocab_size=VOCAB)
    hf_to_torch_dist(model, tmp_path / "saved")
    read: list[str] = []
    real = TorchDistFolder.tensor

    def counting(self: TorchDistFolder, key: str, *part: Any) -> torch.Tensor:
        read.append(key)
        if len(read) == 40:
            raise KeyboardInterrupt
        return real(self, key, *part)

    def convert(max_shard_bytes: int) -> None:
        megatron_to_hf(
            tmp_path / "saved", tmp_path / "back", origin=model, max_shard_bytes=max_shard_bytes
        )

    monkeypatch.setattr(TorchDistFolder, "tensor", counting)
    with pytest.raises(KeyboardInterrupt):
        convert(50_000)
    assert not (tmp_path / "back").exists()
    files = sorted(path.name for path in (tmp_path / "back.partial").glob("*.tmp"))
    assert files == [f"shard-{number}.tmp" for number in range(len(files))]
    assert len(files) >= 3
    (tmp_path / "back.partial" / files[-1]).unlink()  # these two are written anew
    (tmp_path / "back.partial" / files[-2]).write_bytes(b"cut short")
    before = len(read)
    convert(50_000)
    again = read[before:]
    assert "embedding.word_embeddings.weight" not in again
    monkeypatch.undo()
    assert_equal(tmp_path / "back", model)
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert all(name.endswith((".safetensors", "config.json", "index.json")) for name in names)
    assert not (tmp_path / "back.partial").exists()


def test_a_way_back_with_other_words_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_family(tmp_path / "model", "llama", vocab_size=VOCAB)
    hf_to_torch_dist(model, tmp_path / "saved")
    real, calls = TorchDistFolder.tensor, iter(range(20))

    def failing(self: TorchDistFolder, *words: Any) -> torch.Tensor:
        if next(calls) == 15:
            raise KeyboardInterrupt
        return real(self, *words)

    monkeypatch.setattr(TorchDistFolder, "tensor", failing)
    with pytest.raises(KeyboardInterrupt):
        megatron_to_hf(tmp_path / "saved", tmp_path / "back", origin=model, max_shard_bytes=50_000)
    monkeypatch.undo()
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", origin=model, max_shard_bytes=10**9)
    assert_equal(tmp_path / "back", model)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 1


def test_one_process_takes_up_what_two_ranks_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_family(tmp_path / "model", "qwen3_moe", vocab_size=VOCAB)
    hf_to_torch_dist(model, tmp_path / "saved")
    barrier, real = threading.Barrier(2, timeout=60), TorchDistFolder.tensor

    def failing(self: TorchDistFolder, key: str, *part: Any) -> torch.Tensor:
        if key.startswith("decoder.layers.3."):
            barrier.abort()
            raise CheckpointError("the disk is gone")
        return real(self, key, *part)

    def convert(ranks: Ranks) -> None:
        megatron_to_hf(
            tmp_path / "saved", tmp_path / "back", origin=model, max_shard_bytes=50_000, ranks=ranks
        )

    def run_both(*expected: type[BaseException]) -> None:
        ranks = [Ranks(rank, 2, lambda: barrier.wait() and None) for rank in range(2)]
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(convert, rank) for rank in ranks]:
                assert isinstance(done.exception(), expected or type(None)), done.exception()

    monkeypatch.setattr(TorchDistFolder, "tensor", failing)
    run_both(CheckpointError, threading.BrokenBarrierError)
    monkeypatch.setattr(TorchDistFolder, "tensor", real)
    assert not (tmp_path / "back").exists()
    (tmp_path / "back.partial" / "shard-99.tmp").write_text("cut short")
    files = list((tmp_path / "back.partial").glob("shard-*.json"))
    assert {int(file.stem.removeprefix("shard-")) % 2 for file in files} == {0, 1}
    convert(Ranks())
    assert_equal(tmp_path / "back", model)
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert all(name.endswith((".safetensors", "config.json", "index.json")) for name in names)
    barrier.reset()
    shutil.rmtree(tmp_path / "back")
    run_both()
    assert_equal(tmp_path / "back", model)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = make_tiny_family(tmp_path / "model", "llama", vocab_size=VOCAB)
    hf_to_torch_dist(model, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="release is there"):
        hf_to_torch_dist(model, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="not empty"):
        megatron_to_hf(tmp_path / "saved", model, origin=model)
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", origin=model)
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", origin=model, overwrite=True)
    assert_equal(tmp_path / "back", model)


def test_another_model_is_named_by_its_tensors(tmp_path: Path) -> None:
    model = make_tiny_family(tmp_path / "model", "qwen3", vocab_size=VOCAB)
    hf_to_torch_dist(model, tmp_path / "saved")
    wider = make_tiny_family(tmp_path / "wider", "qwen3", vocab_size=VOCAB, intermediate_size=256)
    with pytest.raises(CheckpointError, match=r"mlp.linear_fc1.weight \[4, 256, 64\] instead of"):
        megatron_to_hf(tmp_path / "saved", tmp_path / "back", origin=wider)
    other = make_tiny_family(tmp_path / "other", "qwen2", vocab_size=VOCAB)
    with pytest.raises(
        CheckpointError, match=r"missing: .*linear_qkv.bias.*; 2 left over: .*layernorm"
    ):
        megatron_to_hf(tmp_path / "saved", tmp_path / "back", origin=other)
    assert not (tmp_path / "back").exists()


def test_left_over_and_missing_tensors_of_a_folder_are_named(tmp_path: Path) -> None:
    model = make_tiny_family(tmp_path / "model", "qwen3", vocab_size=VOCAB)
    tensors = tensors_of(model)
    tensors["model.layers.0.mlp.extra.weight"] = tensors.pop("model.norm.weight")
    write_hf_folder(tmp_path / "odd", tensors.items(), config_from=model)
    with pytest.raises(CheckpointError, match=r"missing: model.norm.weight; .*mlp.extra.weight"):
        hf_to_torch_dist(tmp_path / "odd", tmp_path / "saved")


def test_layers_for_multi_token_prediction_come_from_the_origin_when_asked(tmp_path: Path) -> None:
    config = tiny_family_config("glm4_moe", vocab_size=VOCAB, num_nextn_predict_layers=1)
    model = Path(make_tiny_family(tmp_path / "model", "glm4_moe", vocab_size=VOCAB))
    tensors = tensors_of(model)
    extra = {"model.layers.4.eh_proj.weight": torch.randn(64, 128)}
    (model / "config.json").write_text(json.dumps(config))
    write_hf_folder(tmp_path / "mtp", (tensors | extra).items(), config_from=model)
    hf_to_torch_dist(tmp_path / "mtp", tmp_path / "saved")
    megatron_to_hf(tmp_path / "saved", tmp_path / "without", origin=tmp_path / "mtp")
    assert tensors_of(tmp_path / "without").keys() == tensors.keys()
    megatron_to_hf(
        tmp_path / "saved", tmp_path / "with", origin=tmp_path / "mtp", adds_missing=True
    )
    assert_equal(tmp_path / "with", tmp_path / "mtp")


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "neither latest_checkpointed_iteration.txt nor metadata.json")],
)
def test_a_folder_without_a_checkpoint_says_so(
    content: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        megatron_to_hf(tmp_path, tmp_path / "back", origin=tmp_path)


def test_an_iteration_can_be_named(tmp_path: Path) -> None:
    model = make_tiny_family(tmp_path / "model", "llama", vocab_size=VOCAB)
    hf_to_torch_dist(model, tmp_path / "saved")
    (tmp_path / "saved" / TRACKER_FILE).unlink()
    with pytest.raises(CheckpointError, match="it holds release: name one of them"):
        megatron_to_hf(tmp_path / "saved", tmp_path / "back", origin=model)
    megatron_to_hf(tmp_path / "saved" / "release", tmp_path / "back", origin=model)
    assert_equal(tmp_path / "back", model)
