"""Layers of the user's own, by --spec."""

import pytest
import torch
from support import spec_plugin
from support.megatron_runs import make_tiny_qwen3, random_batch, start_trainer, trainer_config

from slime.errors import ConfigError
from slime.training.interface import ModelTag

pytestmark = pytest.mark.trainer

VOCAB = 106


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), vocab_size=VOCAB)


def log_probs(model: str, *words: str) -> list[torch.Tensor]:
    trainer = start_trainer(trainer_config(model, *words))
    trainer.load()
    return trainer.log_probs(random_batch(num_samples=3, vocab_size=VOCAB, seed=0), ModelTag.ACTOR)


def test_the_function_of_spec_makes_the_layers(model: str) -> None:
    expected = log_probs(model)
    assert spec_plugin.CALLS == []
    found = log_probs(model, "--spec", "support.spec_plugin", "plain_layers")
    assert spec_plugin.CALLS == [None]
    assert all(map(torch.equal, found, expected))


def test_a_function_that_is_not_there_is_named(model: str) -> None:
    with pytest.raises(ConfigError, match="spec_plugin"):
        log_probs(model, "--spec", "support.spec_plugin", "no_layers")
