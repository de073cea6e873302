"""The names and shapes that published checkpoints have on disk, written out, against the tables.

Expanded from the patterns of the published files, without anything of slime: what a table leaves out, or
has too much, is a difference of two sets.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from support.published_configs import MODEL_SCRIPTS

from slime.checkpoint.dims import ModelDims
from slime.checkpoint.mapping import load_mapping

Shapes = dict[str, tuple[int, ...]]


def mlp(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def experts(prefix: str, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    count = config.get("num_experts") or config["n_routed_experts"]
    yield f"{prefix}.gate.weight", (count, hidden)
    for number in range(count):
        yield from mlp(f"{prefix}.experts.{number}", width, hidden)
    if "n_routed_experts" in config:
        yield f"{prefix}.gate.e_score_correction_bias", (count,)
        yield from mlp(f"{prefix}.shared_experts", width * config["n_shared_experts"], hidden)


def attention(prefix: str, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config["model_type"] == "deepseek_v3":
        query = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
        low, rank = config["q_lora_rank"], config["kv_lora_rank"]
        if low is None:
            yield f"{prefix}.q_proj.weight", (query, hidden)
        else:
            yield f"{prefix}.q_a_proj.weight", (low, hidden)
            yield f"{prefix}.q_a_layernorm.weight", (low,)
            yield f"{prefix}.q_b_proj.weight", (query, low)
        yield (
            f"{prefix}.kv_a_proj_with_mqa.weight",
            (rank + config["qk_rope_head_dim"], hidden),
        )
        yield f"{prefix}.kv_a_layernorm.weight", (rank,)
        both = heads * (config["qk_nope_head_dim"] + config["v_head_dim"])
        yield f"{prefix}.kv_b_proj.weight", (both, rank)
        yield f"{prefix}.o_proj.weight", (hidden, heads * config["v_head_dim"])
        return
    size = config.get("head_dim") or hidden // heads
    widths = {"q": heads * size, "k": config["num_key_value_heads"] * size}
    widths["v"] = widths["k"]
    has_bias = config["model_type"] in ("qwen2", "glm4", "glm4_moe")
    for name, width in widths.items():
        yield f"{prefix}.{name}_proj.weight", (width, hidden)
        if has_bias:
            yield f"{prefix}.{name}_proj.bias", (width,)
    yield f"{prefix}.o_proj.weight", (hidden, widths["q"])
    if config["model_type"] == "olmo2":  # one weight for each number of all heads
        yield f"{prefix}.q_norm.weight", (widths["q"],)
        yield f"{prefix}.k_norm.weight", (widths["k"],)
    elif config["model_type"].startswith("qwen3") or config.get("use_qk_norm"):
        yield f"{prefix}.q_norm.weight", (size,)
        yield f"{prefix}.k_norm.weight", (size,)


def layer(index: int, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix, hidden = f"model.layers.{index}", config["hidden_size"]
    is_olmo = config["model_type"] == "olmo2"
    first_norm, second_norm = (
        ("post_attention_layernorm", "post_feedforward_layernorm")
        if is_olmo
        else ("input_layernorm", "post_attention_layernorm")
    )
    yield f"{prefix}.{first_norm}.weight", (hidden,)
    yield f"{prefix}.{second_norm}.weight", (hidden,)
    yield from attention(f"{prefix}.self_attn", config)
    first = config.get("first_k_dense_replace", 0)
    if config["model_type"] == "qwen3_moe" or (first and index >= first):
        yield from experts(f"{prefix}.mlp", config)
    elif config["model_type"] == "glm4":
        width = config["intermediate_size"]
        yield f"{prefix}.mlp.gate_up_proj.weight", (2 * width, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, width)
        yield f"{prefix}.post_self_attn_layernorm.weight", (hidden,)
        yield f"{prefix}.post_mlp_layernorm.weight", (hidden,)
    else:
        yield from mlp(f"{prefix}.mlp", config["intermediate_size"], hidden)


def on_disk(config: dict[str, Any]) -> Shapes:
    """Everything a checkpoint with this config holds, but for multi-token prediction."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for index in range(config["num_hidden_layers"]):
        shapes |= dict(layer(index, config))
    return shapes


def prediction_layers(config: dict[str, Any]) -> set[str]:
    """Names of the layers for multi-token prediction: whole layers, and what joins them."""
    names: set[str] = set()
    first = config["num_hidden_layers"]
    for index in range(first, first + config.get("num_nextn_predict_layers", 0)):
        names |= {name for name, _ in layer(index, config)}
        names |= {
            f"model.layers.{index}.{name}.weight"
            for name in (
                "eh_proj",
                "enorm",
                "hnorm",
                "shared_head.norm",
                "embed_tokens",
                "shared_head.head",
            )
        }
    return names


@pytest.mark.parametrize("name", MODEL_SCRIPTS)
def test_the_table_has_every_tensor_in_its_shape_and_no_other(name: str) -> None:
    config = MODEL_SCRIPTS[name]
    dims = ModelDims.from_hf_config(config)
    mapping = load_mapping(config["model_type"])
    found, expected = mapping.hf_parameters(dims), on_disk(config)
    assert found.keys() - expected.keys() == set()
    assert expected.keys() - found.keys() == set()
    assert [key for key, shape in expected.items() if found[key] != shape] == []


@pytest.mark.parametrize("name", ["deepseek-v3", "glm4.5-355B-A32B", "glm4.5-106B-A12B"])
def test_layers_for_multi_token_prediction_are_known_to_be_left_out(name: str) -> None:
    config = MODEL_SCRIPTS[name]
    names = prediction_layers(config)
    assert names
    redundant = load_mapping(config["model_type"]).redundant_hf_names(
        ModelDims.from_hf_config(config)
    )
    assert names - redundant == set()
