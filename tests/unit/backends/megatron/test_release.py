"""A converted Hugging Face folder in the trainer: other paddings, and other words for its layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.megatron_runs import (
    policy_gradient_loss,
    random_batch,
    start_trainer,
    train_step,
    trainer_config,
    weights_of,
)
from support.tiny_families import make_tiny_family

from slime.checkpoint.folders import hf_to_torch_dist
from slime.checkpoint.hf import HfFolder
from slime.errors import CheckpointError

pytestmark = pytest.mark.trainer

VOCAB = 106


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    return Path(make_tiny_family(folder, "qwen3_moe", vocab_size=VOCAB))


def started(model: Path, *words: str) -> Any:
    trainer = start_trainer(trainer_config(model, *words))
    trainer.load()
    return trainer


def assert_same_weights(trainer: Any, model: Path) -> None:
    weights = weights_of(trainer)
    with HfFolder(model) as folder:
        assert weights.keys() == set(folder.names())
        for name in folder.names():
            assert torch.equal(weights[name], folder.tensor(name)), name


@pytest.mark.parametrize("rows", [VOCAB, 128, 320])
@pytest.mark.parametrize("words", [(), ("--make-vocab-size-divisible-by", "100")])
def test_a_vocabulary_of_any_padding_loads(
    rows: int, words: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    hf_to_torch_dist(model, tmp_path, padded_vocab_size=rows)
    trainer = started(model, "--load", str(tmp_path), *words)
    assert_same_weights(trainer, model)
    embedding = trainer._bare[0].embedding.word_embeddings.weight
    assert embedding.shape[0] == (200 if words else 112)
    assert not embedding[VOCAB:].any()


def test_a_run_goes_on_with_another_padding(model: Path, tmp_path: Path) -> None:
    first = started(model, "--save", str(tmp_path), "--save-interval", "1")
    batches = [random_batch(num_samples=6, vocab_size=VOCAB, seed=seed) for seed in (1, 2)]
    first.train_step(train_step(batches[0]), policy_gradient_loss)
    first.save(0)
    expected = first.train_step(train_step(batches[1]), policy_gradient_loss)
    wider = started(model, "--load", str(tmp_path), "--make-vocab-size-divisible-by", "100")
    found = wider.train_step(train_step(batches[1]), policy_gradient_loss)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    ours, theirs = weights_of(wider), weights_of(first)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0.0, atol=1e-6, msg=name)


def test_a_smaller_vocabulary_is_another_model(model: Path, tmp_path: Path) -> None:
    smaller = make_tiny_family(tmp_path / "smaller", "qwen3_moe", vocab_size=VOCAB - 1)
    hf_to_torch_dist(smaller, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        started(model, "--load", str(tmp_path / "saved"))


@pytest.mark.parametrize("pattern", ["1", "[1]*4", "([1]*2)*2"])
def test_the_pattern_of_layers_may_be_written_in_any_way(
    pattern: str, model: Path, tmp_path: Path
) -> None:
    hf_to_torch_dist(model, tmp_path)
    assert_same_weights(started(model, "--load", str(tmp_path), "--moe-layer-freq", pattern), model)
