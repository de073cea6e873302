"""The model's weights and the architecture's table have to be the same ones."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from support.megatron_runs import make_tiny_qwen3, start_trainer, trainer_config

from slime.backends.megatron.state.named_weights import load_hf, named_weights
from slime.checkpoint.mapping import Rename
from slime.errors import CheckpointError, UnknownParameter

VOCAB = 106


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), vocab_size=VOCAB)


@pytest.fixture(scope="module")
def trainer(model: str) -> Iterator[Any]:
    trainer = start_trainer(trainer_config(model))
    trainer.load()
    yield trainer
    dist.destroy_process_group()


def test_a_row_of_the_table_that_no_stage_holds_is_named(trainer: Any) -> None:
    architecture = trainer._architecture
    row = Rename("self_attention.extra.weight", "self_attn.extra.weight")
    mapping = replace(architecture.mapping, layer=[*architecture.mapping.layer, row])
    wider = replace(architecture, mapping=mapping)
    message = r"no pipeline stage .*decoder\.layers\.0\.self_attention\.extra\.weight"
    with pytest.raises(CheckpointError, match=message):
        next(named_weights(trainer._bare, wider))


def test_a_model_that_lacks_a_weight_of_the_folder_is_named(trainer: Any, model: str) -> None:
    message = r"no pipeline stage .* has embedding\.word_embeddings\.weight, .*, \.\.\., \d+ of"
    with pytest.raises(CheckpointError, match=message):
        load_hf([], trainer._architecture, model)


def test_a_weight_that_the_table_lacks_is_named(trainer: Any, model: str) -> None:
    architecture = trainer._architecture
    rows = [r for r in architecture.mapping.layer if r.megatron != "mlp.linear_fc2.weight"]
    dense = [r for r in architecture.mapping.dense if r.megatron != "mlp.linear_fc2.weight"]
    narrower = replace(architecture, mapping=replace(architecture.mapping, layer=rows, dense=dense))
    with pytest.raises(UnknownParameter, match=r"mlp\.linear_fc2\.weight"):
        next(named_weights(trainer._bare, narrower))
    with pytest.raises(CheckpointError, match="left over"):
        load_hf(trainer._bare, narrower, model)
