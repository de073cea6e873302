"""The tables hold every tensor of published models: their totals are the known ones."""

import math
from typing import Any

import pytest
from support.published_configs import (
    DEEPSEEK_R1,
    GLM4_9B,
    GLM45_355B,
    GLM45_AIR,
    MOONLIGHT,
    OLMO2_1B,
    QWEN3_30B_A3B,
)
from support.tiny_families import FAMILIES, tiny_family_config

from slime.checkpoint.convert import count_parameters
from slime.checkpoint.mapping import ModelDims, load_mapping

# Tensors on disk, parameters in Megatron, numbers in all, without multi-token prediction.
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 3 + 48 * (9 + 3 * 128), 3 + 48 * 9, 30_532_122_624),
    "GLM-4-9B-0414": (GLM4_9B, 3 + 40 * 13, 3 + 40 * 9, 9_400_279_040),
    "OLMo-2-0425-1B": (OLMO2_1B, 3 + 16 * 11, 3 + 16 * 8, 1_484_916_736),
    "GLM-4.5-Air": (
        GLM45_AIR,
        3 + 46 * 9 + 3 + 45 * (5 + 3 * 128),
        3 + 46 * 5 + 2 + 45 * 6,
        106_852_251_264,
    ),
    "DeepSeek-R1": (
        DEEPSEEK_R1,
        3 + 61 * 9 + 3 * 3 + 58 * (5 + 3 * 256),
        3 + 61 * 9 + 3 * 2 + 58 * 6,
        671_026_419_200,
    ),
}


def _numbers(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_is_covered_without_a_remainder(name: str) -> None:
    config, num_tensors, num_parameters, total = PUBLISHED[name]
    mapping, dims = load_mapping(config["model_type"]), ModelDims.from_hf_config(config)
    on_disk, in_megatron = mapping.hf_parameters(dims), mapping.megatron_parameters(dims)
    assert (len(on_disk), len(in_megatron)) == (num_tensors, num_parameters)
    assert _numbers(on_disk) == _numbers(in_megatron) == total


@pytest.mark.parametrize(
    ("config", "total"),
    [(GLM45_AIR, 110_468_824_832), (GLM45_355B, 358_337_791_296)],
)
def test_layer_for_multi_token_prediction_is_what_the_published_total_has_besides(
    config: dict[str, Any], total: int
) -> None:
    mapping, dims = load_mapping(config["model_type"]), ModelDims.from_hf_config(config)
    last = f"model.layers.{dims.num_layers - 1}."
    shapes = mapping.hf_parameters(dims)
    mtp = {name: shape for name, shape in shapes.items() if name.startswith(last)}
    norm, vocabulary = (dims.hidden,), (dims.vocab_size, dims.hidden)
    mtp |= {f"{last}{word}.weight": norm for word in ("enorm", "hnorm", "shared_head.norm")}
    mtp |= {f"{last}{word}.weight": vocabulary for word in ("embed_tokens", "shared_head.head")}
    mtp[f"{last}eh_proj.weight"] = (dims.hidden, 2 * dims.hidden)
    assert _numbers(shapes) + _numbers(mtp) == total
    after = f"model.layers.{dims.num_layers}."
    assert {name.replace(last, after) for name in mtp} <= mapping.redundant_hf_names(dims)


@pytest.mark.parametrize("config", [*(row[0] for row in PUBLISHED.values()), GLM45_355B, MOONLIGHT])
def test_count_of_a_published_model_is_that_of_the_table(config: dict[str, Any]) -> None:
    mapping, dims = load_mapping(config["model_type"]), ModelDims.from_hf_config(config)
    assert count_parameters(config) == _numbers(mapping.hf_parameters(dims))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_count_of_a_small_model_is_that_of_the_table(model_type: str, tied: bool) -> None:
    config = tiny_family_config(model_type, vocab_size=106, tie_word_embeddings=tied)
    shapes = load_mapping(model_type).hf_parameters(ModelDims.from_hf_config(config))
    assert count_parameters(config) == _numbers(shapes)
