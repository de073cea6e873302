"""Hugging Face folders: what is written is read back, whole or not at all."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tiny_checkpoints import make_tiny_qwen3, random_weights, tiny_config
from torch import Tensor

from slime.checkpoint import hf
from slime.checkpoint.hf import HfFolder, check_names
from slime.checkpoint.hf_writer import write_hf_folder
from slime.errors import CheckpointError


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A folder with config, tokenizer files and weights."""
    path = tmp_path / "origin"
    make_tiny_qwen3(path, vocab_size=106, tied=False)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "notes.md"):
        (path / name).write_text("{}")
    return path


def _read_all(path: Path) -> dict[str, Tensor]:
    with HfFolder(path) as folder:
        return {name: folder.tensor(name) for name in folder.names()}


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_one_file_is_written_and_read_back(origin: Path, tmp_path: Path) -> None:
    weights = random_weights(tiny_config(tied=False), seed=1)
    write_hf_folder(tmp_path / "out", weights.items(), config_from=origin)
    assert _same(_read_all(tmp_path / "out"), weights)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["origin", "out"]


def test_shards_stay_under_their_size_and_read_back(origin: Path, tmp_path: Path) -> None:
    weights = random_weights(tiny_config(tied=False), seed=1)
    write_hf_folder(tmp_path / "out", weights.items(), config_from=origin, max_shard_bytes=100_000)
    assert _same(_read_all(tmp_path / "out"), weights)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files][:1] == [f"model-00001-of-{len(files):05d}.safetensors"]
    assert len(files) > 3
    header = 64 * 2**10
    assert all(file.stat().st_size <= 100_000 + header for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * w.numel() for w in weights.values())
    assert set(index["weight_map"].values()) == {file.name for file in files}


def test_tensor_outlives_the_folder_and_shape_needs_no_tensor(origin: Path) -> None:
    with HfFolder(origin) as folder:
        norm = folder.tensor("model.norm.weight")
        assert folder.shape("lm_head.weight") == (106, 64)
    assert torch.equal(norm, random_weights(tiny_config(tied=False))["model.norm.weight"])


def test_written_dtype_is_stated_in_the_config(origin: Path, tmp_path: Path) -> None:
    weights = random_weights(tiny_config(tied=False))
    write_hf_folder(tmp_path / "out", weights.items(), config_from=origin, dtype=torch.bfloat16)
    with HfFolder(tmp_path / "out") as folder:
        assert folder.config["torch_dtype"] == "bfloat16"
        assert folder.config["num_hidden_layers"] == 2
        got = folder.tensor("lm_head.weight")
    assert torch.equal(got, weights["lm_head.weight"].bfloat16())


def test_what_keeps_its_dtype_is_not_cast(origin: Path, tmp_path: Path) -> None:
    weights = random_weights(tiny_config(tied=False))
    kept = "model.norm.weight"
    write_hf_folder(
        tmp_path / "out",
        weights.items(),
        config_from=origin,
        dtype=torch.bfloat16,
        keep_dtype={kept},
    )
    written = _read_all(tmp_path / "out")
    assert torch.equal(written.pop(kept), weights[kept])
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_views_and_reused_buffers_are_copied(origin: Path, tmp_path: Path) -> None:
    buffer = torch.zeros(8, 6)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for i in range(3):
            buffer.fill_(i)
            yield f"t{i}", buffer[:, 2:4].t()

    write_hf_folder(tmp_path / "out", stream(), config_from=origin)
    assert _same(
        _read_all(tmp_path / "out"), {f"t{i}": torch.full((2, 8), float(i)) for i in range(3)}
    )


def test_output_layer_of_a_tied_model_is_left_out(tmp_path: Path) -> None:
    make_tiny_qwen3(tmp_path / "origin", vocab_size=106, tied=True)
    weights = random_weights(tiny_config(tied=True))
    tensors = [*weights.items(), ("lm_head.weight", weights["model.embed_tokens.weight"])]
    write_hf_folder(
        tmp_path / "out", tensors, config_from=tmp_path / "origin", expected=weights.keys()
    )
    assert _same(_read_all(tmp_path / "out"), weights)


def test_folder_in_use_is_refused_unless_told(origin: Path, tmp_path: Path) -> None:
    weights = random_weights(tiny_config(tied=False), seed=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        write_hf_folder(tmp_path / "out", weights.items(), config_from=origin)
    assert (tmp_path / "out" / "old.txt").exists()
    write_hf_folder(tmp_path / "out", weights.items(), config_from=origin, overwrite=True)
    assert _same(_read_all(tmp_path / "out"), weights)
    assert not (tmp_path / "out" / "old.txt").exists()


def test_failed_write_leaves_the_old_folder_and_no_litter(origin: Path, tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, Tensor]]:
        yield "model.norm.weight", torch.zeros(64)
        raise RuntimeError("the trainer died")

    with pytest.raises(RuntimeError, match="died"):
        write_hf_folder(origin, stream(), config_from=origin, overwrite=True)
    assert _same(_read_all(origin), random_weights(tiny_config(tied=False)))
    assert [path.name for path in tmp_path.iterdir()] == ["origin"]


def test_missing_and_left_over_tensors_stop_a_write_by_name(origin: Path, tmp_path: Path) -> None:
    weights = random_weights(tiny_config(tied=False))
    expected = [*weights, "model.forgotten.weight"]
    del weights["model.norm.weight"]
    weights["model.extra.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        write_hf_folder(tmp_path / "out", weights.items(), config_from=origin, expected=expected)
    assert "2 missing: model.forgotten.weight, model.norm.weight" in str(error.value)
    assert "1 left over: model.extra.weight" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_tensor_that_comes_twice_is_refused(origin: Path, tmp_path: Path) -> None:
    twice = [("a", torch.zeros(1)), ("a", torch.zeros(1))]
    with pytest.raises(CheckpointError, match="a came twice"):
        write_hf_folder(tmp_path / "out", twice, config_from=origin)


def test_ignored_names_may_be_there_or_not() -> None:
    check_names({"a", "lm_head.weight"}, {"a"}, ignored={"lm_head.weight"}, where="x")
    check_names({"a"}, {"a"}, ignored={"lm_head.weight"}, where="x")
    with pytest.raises(CheckpointError, match="1 left over: b"):
        check_names({"a", "b"}, {"a"}, where="x")


def test_unknown_tensor_is_refused_by_name(origin: Path) -> None:
    with HfFolder(origin) as folder, pytest.raises(CheckpointError, match=r"no tensor model\.nrm"):
        folder.tensor("model.nrm")


def test_folder_without_config_or_weights_is_refused(origin: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        HfFolder(tmp_path / "nowhere")
    (origin / "model.safetensors").unlink()
    with HfFolder(origin) as folder, pytest.raises(CheckpointError, match="no safetensors files"):
        folder.names()


def test_shard_missing_from_a_download_is_named(origin: Path, tmp_path: Path) -> None:
    weights = random_weights(tiny_config(tied=False))
    write_hf_folder(tmp_path / "out", weights.items(), config_from=origin, max_shard_bytes=100_000)
    next((tmp_path / "out").glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-.* is missing"):
        _read_all(tmp_path / "out")


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    tensors = {f"t{number}": torch.full((10,), float(number)) for number in range(9)}
    write_hf_folder(tmp_path / "out", tensors.items(), config_from=source, max_shard_bytes=40)
    with HfFolder(tmp_path / "out") as folder:
        for _ in range(2):
            for name, tensor in tensors.items():
                assert torch.equal(folder.tensor(name), tensor)
                assert len(folder._open) <= hf._MAX_OPEN_FILES
        kept = folder.tensor("t0")
    assert torch.equal(kept, tensors["t0"])


def test_a_file_of_which_much_was_read_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "_MAX_MAPPED_BYTES", 100)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    tensors = {f"t{number}": torch.full((10,), float(number)) for number in range(9)}
    write_hf_folder(tmp_path / "out", tensors.items(), config_from=source)
    with HfFolder(tmp_path / "out") as folder:
        found = {name: folder.tensor(name) for name in folder.names()}
        assert not folder._open  # the last of nine was a third one
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
