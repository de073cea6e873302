"""Claims about checkpoints that are damaged, of another model, or do not fit on the disk."""

import resource
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.megatron_runs import make_tiny_qwen3, start_trainer, trainer_config

from slime.errors import CheckpointError

VOCAB = 106


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), vocab_size=VOCAB)


def started(model: str, *words: str) -> Any:
    trainer = start_trainer(trainer_config(model, *words))
    trainer.load()
    return trainer


@pytest.fixture(scope="module")
def saved(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one whole checkpoint, iter_0000000."""
    folder = tmp_path_factory.mktemp("saved")
    started(model, "--save", str(folder), "--save-interval", "1").save(0)
    return folder


@contextmanager
def files_limited_to(num_bytes: int) -> Generator[None]:
    """Every write beyond `num_bytes` of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint_in_charge(model: str, tmp_path: Path) -> None:
    trainer = started(model, "--save", str(tmp_path), "--save-interval", "1")
    trainer.save(0)
    with files_limited_to(50_000), pytest.raises(CheckpointError) as caught:
        trainer.save(1)
    message = str(caught.value)
    assert "File too large" in message
    assert "MiB free there, about" in message
    assert "still the latest" in message
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000000"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "0"
    resumed = start_trainer(trainer_config(model, "--load", str(tmp_path)))
    assert resumed.load() == 1
    trainer.save(1)  # once there is room again
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"


def truncate(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def _cut(name: str, keep: float = 0.5) -> Callable[[Path], None]:
    return lambda folder: truncate(next((folder / "iter_0000000").glob(name)), keep)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: next((folder / "iter_0000000").glob(name)).unlink()


def _number(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text(text) and None


DAMAGES: dict[str, Callable[[Path], None]] = {
    "tensors cut": _cut("*.distcp"),
    "tensors empty": _cut("*.distcp", keep=0.0),
    "tensors missing": _remove("*.distcp"),
    "table of tensors cut": _cut(".metadata"),
    "table of tensors missing": _remove(".metadata"),
    "metadata cut": _cut("metadata.json"),
    "metadata missing": _remove("metadata.json"),
    "number is a word": _number("seven"),
    "number empty": _number(""),
    "number of a folder that is not there": _number("3"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named(name: str, model: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    DAMAGES[name](folder)
    trainer = start_trainer(trainer_config(model, "--load", str(folder)))
    with pytest.raises(CheckpointError, match=str(folder)):
        trainer.load()


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 96}, {"num_hidden_layers": 3}, {"vocab_size": 200}]
)
def test_a_checkpoint_of_another_shape_is_refused(
    changes: dict[str, int], model: str, saved: Path, tmp_path: Path
) -> None:
    other = make_tiny_qwen3(tmp_path / "other", **({"vocab_size": VOCAB} | changes))
    trainer = start_trainer(trainer_config(other, "--load", str(saved)))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        trainer.load()


def test_model_files_cut_short_are_named(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    truncate(folder / "model.safetensors")
    trainer = start_trainer(trainer_config(folder))
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*damaged or cut short"):
        trainer.load()
