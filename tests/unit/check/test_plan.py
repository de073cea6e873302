"""Numbers of a plan are those the run itself works with."""

import math

import pytest
from support.tiny_checkpoints import load_mapping, tiny_config

from slime.check.model import count_parameters
from slime.checkpoint.dims import ModelDims


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_that_the_mapping_lists(model_type: str, tied: bool) -> None:
    config = tiny_config(model_type, tied=tied)
    shapes = load_mapping(model_type).hf_parameters(ModelDims.from_hf_config(config))
    assert count_parameters(config) == sum(math.prod(shape) for shape in shapes.values())
