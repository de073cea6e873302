"""Tables of all families: bit-equal round trips over ranks, experts one by one, buffers, MTP."""

from collections.abc import Iterator

import pytest
import torch
from support.tiny_families import FAMILIES, tiny_family_config, tiny_family_weights
from torch import Tensor

from slime.checkpoint.mapping import BoundEntry, Mapping, ModelDims, load_mapping
from slime.errors import CheckpointError, ShapeMismatch, UnknownParameter

WITH_EXPERTS = ("qwen3_moe", "glm4_moe", "deepseek_v3")


def _dims(model_type: str, **changes: object) -> ModelDims:
    config = tiny_family_config(model_type, vocab_size=106, **changes)
    return ModelDims.from_hf_config(config, padded_vocab_size=128)


def _single(mapping: Mapping, dims: ModelDims) -> Iterator[BoundEntry]:
    """All parameters, each expert apart."""
    for bound in mapping.parameters(dims):
        if bound.num_experts is None:
            yield bound
        else:
            yield from (bound.expert(e) for e in range(bound.num_experts))


def _through_ranks(bound: BoundEntry, whole: Tensor, size: int) -> Tensor:
    return bound.unshard([bound.shard(whole, rank, size) for rank in range(size)])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_hf_to_megatron_to_hf_is_bit_equal_over_ranks(model_type: str, size: int) -> None:
    before = tiny_family_weights(tiny_family_config(model_type, vocab_size=106))
    after: dict[str, Tensor] = {}
    for bound in load_mapping(model_type).parameters(dims := _dims(model_type)):
        whole = bound.from_hf([before[name] for name in bound.hf_names])
        assert tuple(whole.shape) == bound.megatron_shape
        parts = bound.to_hf(_through_ranks(bound, whole, size))
        after |= zip(bound.hf_names, parts, strict=True)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert dims.padded_vocab_size == 128


@pytest.mark.parametrize("etp_size", [1, 2])
@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_single_experts_make_the_round_trip_too(model_type: str, etp_size: int) -> None:
    before = tiny_family_weights(tiny_family_config(model_type, vocab_size=106))
    after: dict[str, Tensor] = {}
    for bound in _single(load_mapping(model_type), _dims(model_type)):
        whole = bound.from_hf([before[name] for name in bound.hf_names])
        parts = bound.to_hf(_through_ranks(bound, whole, etp_size))
        after |= zip(bound.hf_names, parts, strict=True)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("etp_size", [1, 2])
@pytest.mark.parametrize("name", ["weight1", "weight2"])
def test_stack_holds_its_experts_in_order_on_every_rank(name: str, etp_size: int) -> None:
    stack = load_mapping("glm4_moe").bind(f"decoder.layers.2.mlp.experts.{name}", _dims("glm4_moe"))
    weights = tiny_family_weights(tiny_family_config("glm4_moe", vocab_size=106))
    whole = stack.from_hf([weights[hf_name] for hf_name in stack.hf_names])
    assert stack.num_experts == 4
    for rank in range(etp_size):
        part = stack.shard(whole, rank, etp_size)
        for e in range(4):
            one = stack.expert(e)
            alone = one.from_hf([weights[hf_name] for hf_name in one.hf_names])
            assert torch.equal(part[e], one.shard(alone, rank, etp_size))


def test_expert_has_its_own_names_and_no_stack_dimension() -> None:
    mapping, dims = load_mapping("qwen3_moe"), _dims("qwen3_moe")
    fc1 = mapping.bind("decoder.layers.3.mlp.experts.weight1", dims)
    fc2 = mapping.bind("decoder.layers.3.mlp.experts.weight2", dims)
    assert (fc1.megatron_shape, fc2.megatron_shape) == ((4, 64, 64), (4, 64, 32))
    assert len(fc1.hf_names) == len(fc1.hf_shapes) == 8
    assert fc1.expert(2).hf_names == (
        "model.layers.3.mlp.experts.2.gate_proj.weight",
        "model.layers.3.mlp.experts.2.up_proj.weight",
    )
    assert fc1.expert(2).megatron_shape == (64, 64)
    assert fc1.expert(2).num_experts is None
    assert fc2.expert(0).hf_names == ("model.layers.3.mlp.experts.0.down_proj.weight",)
    assert fc2.expert(0).hf_shapes == ((64, 32),)


def test_expert_that_is_not_there_is_refused_by_name() -> None:
    mapping, dims = load_mapping("qwen3_moe"), _dims("qwen3_moe")
    stack = mapping.bind("decoder.layers.3.mlp.experts.weight1", dims)
    with pytest.raises(UnknownParameter, match=r"layers\.3\.mlp\.experts\.weight1 .*expert 4.* 4"):
        stack.expert(4)
    router = mapping.bind("decoder.layers.3.mlp.router.weight", dims)
    with pytest.raises(UnknownParameter, match=r"router\.weight has no expert 0, but none"):
        router.expert(0)


def test_wrong_shape_of_an_expert_names_the_expert() -> None:
    stack = load_mapping("qwen3_moe").bind(
        "decoder.layers.1.mlp.experts.weight2", _dims("qwen3_moe")
    )
    with pytest.raises(ShapeMismatch, match=r"layers\.1\.mlp\.experts\.3\.down_proj\.weight"):
        stack.expert(3).from_hf([torch.zeros(3, 3)])
    with pytest.raises(ShapeMismatch, match=r"layers\.1\.mlp\.experts\.weight2\[3\].*5 tensor"):
        stack.expert(3).shard(torch.zeros(64, 32), 0, 5)


@pytest.mark.parametrize("model_type", ["glm4_moe", "deepseek_v3"])
def test_bias_of_the_router_is_a_buffer_and_nothing_else_is(model_type: str) -> None:
    mapping, dims = load_mapping(model_type), _dims(model_type)
    buffers = [bound for bound in mapping.parameters(dims) if bound.is_buffer]
    assert [bound.megatron_name for bound in buffers] == [
        f"decoder.layers.{i}.mlp.router.expert_bias" for i in (1, 2, 3)
    ]
    assert mapping.hf_buffers(dims) == {
        f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2, 3)
    }


def test_dense_layer_has_an_mlp_and_no_router() -> None:
    mapping, dims = load_mapping("deepseek_v3"), _dims("deepseek_v3")
    assert mapping.bind("decoder.layers.0.mlp.linear_fc1.weight", dims).megatron_shape == (256, 64)
    for name in ("decoder.layers.0.mlp.router.weight", "decoder.layers.1.mlp.linear_fc1.weight"):
        with pytest.raises(UnknownParameter, match=name.replace(".", r"\.")):
            mapping.bind(name, dims)


def test_qwen3_says_which_layers_are_dense() -> None:
    dims = _dims("qwen3_moe", mlp_only_layers=[3], decoder_sparse_step=2)
    assert [dims.is_moe_layer(i) for i in range(4)] == [False, True, False, False]


def test_rows_that_depend_on_the_config_come_and_go_with_it() -> None:
    def names(model_type: str, **changes: object) -> set[str]:
        shapes = load_mapping(model_type).megatron_parameters(_dims(model_type, **changes))
        return {name.removeprefix("decoder.layers.1.") for name in shapes}

    norms = {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}
    assert names("glm4_moe") - names("glm4_moe", use_qk_norm=False) >= norms
    assert "self_attention.linear_qkv.bias" in names("glm4")
    assert "self_attention.linear_qkv.bias" not in names("glm4", attention_bias=False)
    assert "mlp.shared_experts.linear_fc1.weight" not in names("glm4_moe", n_shared_experts=0)
    low, direct = names("deepseek_v3"), names("deepseek_v3", q_lora_rank=None)
    assert "self_attention.linear_q_proj.weight" in direct - low
    assert "self_attention.linear_q_up_proj.weight" in low - direct


def test_up_projections_of_latent_attention_are_cut_by_heads_and_down_ones_are_whole() -> None:
    mapping, dims = load_mapping("deepseek_v3"), _dims("deepseek_v3")
    expected = {
        "linear_q_down_proj": "replicated",
        "linear_q_up_proj": "column",
        "linear_kv_down_proj": "replicated",
        "linear_kv_up_proj": "column",
        "linear_proj": "row",
    }
    cuts = {
        name: mapping.bind(f"decoder.layers.1.self_attention.{name}.weight", dims)
        for name in expected
    }
    assert {name: bound.sharding for name, bound in cuts.items()} == expected
    assert cuts["linear_q_up_proj"].megatron_shape == (4 * (16 + 8), 32)
    assert cuts["linear_kv_down_proj"].megatron_shape == (16 + 8, 64)
    assert cuts["linear_kv_up_proj"].megatron_shape == (4 * (16 + 16), 16)


def test_glm4_has_gate_above_up_in_one_tensor_and_cuts_each() -> None:
    bound = load_mapping("glm4").bind("decoder.layers.0.mlp.linear_fc1.weight", _dims("glm4"))
    assert bound.hf_names == ("model.layers.0.mlp.gate_up_proj.weight",)
    whole = torch.arange(256.0)[:, None].expand(256, 64)
    rows = bound.shard(whole, 1, 2)[:, 0]
    assert torch.equal(rows, torch.cat([torch.arange(64.0, 128), torch.arange(192.0, 256)]))


@pytest.mark.parametrize("model_type", ["glm4_moe", "deepseek_v3"])
def test_layer_for_multi_token_prediction_is_redundant_and_later_ones_are_not(
    model_type: str,
) -> None:
    mapping, dims = load_mapping(model_type), _dims(model_type, num_nextn_predict_layers=1)
    redundant = mapping.redundant_hf_names(dims)
    assert {
        "model.layers.4.eh_proj.weight",
        "model.layers.4.shared_head.head.weight",
        "model.layers.4.mlp.experts.3.down_proj.weight",
        "model.layers.4.self_attn.o_proj.weight",
    } <= redundant
    assert all(name.startswith("model.layers.4.") for name in redundant)
    assert not redundant & mapping.hf_parameters(dims).keys()
    assert not mapping.redundant_hf_names(_dims(model_type))


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("qwen3_moe", "moe_intermediate_size"),
        ("qwen3_moe", "num_experts"),
        ("deepseek_v3", "first_k_dense_replace"),
        ("deepseek_v3", "kv_lora_rank"),
    ],
)
def test_config_without_a_size_of_its_family_is_refused_by_its_key(
    model_type: str, key: str
) -> None:
    config = tiny_family_config(model_type, vocab_size=106)
    del config[key]
    with pytest.raises(CheckpointError, match=f"number.* as {key}"):
        ModelDims.from_hf_config(config)
