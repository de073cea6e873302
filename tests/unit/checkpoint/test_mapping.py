"""Mapping tables: names and shapes of real checkpoints, and HF -> Megatron -> HF bit for bit."""

import math

import pytest
import torch
from support.tiny_checkpoints import random_weights, tiny_config
from support.tiny_families import tiny_family_config
from torch import Tensor

from slime.checkpoint.mapping import BoundEntry, ExpertStack, Mapping, ModelDims, load_mapping
from slime.errors import CheckpointError, ConfigError, ShapeMismatch, UnknownParameter

ARCHITECTURES = ("qwen3", "qwen2", "llama")

QWEN3_4B = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
SMOLLM2_135M = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def _load(mapping: Mapping, dims: ModelDims, hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """All Megatron tensors of a model, whole."""
    return {
        entry.megatron_name: entry.from_hf([hf[name] for name in entry.hf_names])
        for entry in mapping.parameters(dims)
    }


def _through_ranks(entry: BoundEntry, whole: Tensor, tp_size: int) -> Tensor:
    return entry.unshard([entry.shard(whole, rank, tp_size) for rank in range(tp_size)])


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_hf_to_megatron_to_hf_is_bit_equal(model_type: str, tied: bool, tp_size: int) -> None:
    config = tiny_config(model_type, tied=tied)
    dims = ModelDims.from_hf_config(config, padded_vocab_size=128)
    mapping, before = load_mapping(model_type), random_weights(config)
    after: dict[str, Tensor] = {}
    for name, whole in _load(mapping, dims, before).items():
        entry = mapping.bind(name, dims)
        after |= zip(
            entry.hf_names, entry.to_hf(_through_ranks(entry, whole, tp_size)), strict=True
        )
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_experts_leave_together_as_each_would_alone(model_type: str) -> None:
    dims = ModelDims.from_hf_config(tiny_family_config(model_type, vocab_size=128))
    mapping = load_mapping(model_type)
    stacks = [entry for entry in mapping.parameters(dims) if entry.num_experts]
    assert (
        len({type(entry.entry.one) for entry in stacks if isinstance(entry.entry, ExpertStack)})
        == 2
    )
    for entry in stacks:
        experts = torch.randn(entry.megatron_shape)[1:]
        together = list(entry.experts_to_hf(1, experts))
        alone = [
            pair
            for number, expert in enumerate(experts, 1)
            for pair in zip(
                entry.expert(number).hf_names, entry.expert(number).to_hf(expert), strict=True
            )
        ]
        assert [name for name, _ in together] == [name for name, _ in alone]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(together, alone, strict=True))
        memory = experts.untyped_storage().data_ptr()
        assert {tensor.untyped_storage().data_ptr() for _, tensor in together} == {memory}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_experts_are_joined_together_as_each_would_alone(size: int) -> None:
    dims = ModelDims.from_hf_config(tiny_family_config("qwen3_moe", vocab_size=128))
    stacks = [e for e in load_mapping("qwen3_moe").parameters(dims) if e.num_experts]
    for entry in stacks:
        whole = torch.randn(entry.megatron_shape)
        parts = [entry.shard(whole, rank, size) for rank in range(size)]
        assert torch.equal(entry.unshard_experts(parts), whole)
        one = entry.expert(2)
        assert torch.equal(one.unshard([part[2] for part in parts]), whole[2])


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_megatron_shapes_are_those_the_table_promises(model_type: str) -> None:
    config = tiny_config(model_type, tied=False)
    dims = ModelDims.from_hf_config(config, padded_vocab_size=128)
    mapping = load_mapping(model_type)
    loaded = _load(mapping, dims, random_weights(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in loaded.items()}
    assert shapes == mapping.megatron_parameters(dims)
    assert shapes["output_layer.weight"] == (128, 64)


def test_qkv_rows_go_by_query_group() -> None:
    config = tiny_config(hidden=4, heads=4, kv_heads=2, head_dim=1, layers=1)
    dims = ModelDims.from_hf_config(config)
    entry = load_mapping("qwen3").bind("decoder.layers.0.self_attention.linear_qkv.weight", dims)
    rows_of_qkv = ([0.0, 1, 2, 3], [10.0, 11], [20.0, 21])
    whole = entry.from_hf([torch.tensor(rows)[:, None].expand(-1, 4) for rows in rows_of_qkv])
    assert whole[:, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert entry.shard(whole, 1, 2)[:, 0].tolist() == [2, 3, 11, 21]


def test_each_rank_gets_its_part_of_gate_and_of_up() -> None:
    dims = ModelDims.from_hf_config(tiny_config(hidden=2, heads=2, kv_heads=2, head_dim=1))
    entry = load_mapping("qwen3").bind("decoder.layers.1.mlp.linear_fc1.weight", dims)
    gate, up = (
        torch.arange(6.0)[:, None].expand(-1, 2),
        torch.arange(10.0, 16.0)[:, None].expand(-1, 2),
    )
    part = entry.shard(entry.from_hf([gate, up]), 1, 2)
    assert part[:, 0].tolist() == [3, 4, 5, 13, 14, 15]
    assert entry.hf_names == (
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    )


def test_input_side_matrices_are_cut_by_columns() -> None:
    dims = ModelDims.from_hf_config(tiny_config())
    entry = load_mapping("qwen3").bind("decoder.layers.0.mlp.linear_fc2.weight", dims)
    whole = torch.arange(64 * 192.0).view(64, 192)
    assert torch.equal(entry.shard(whole, 1, 2), whole[:, 96:])


def test_padding_rows_of_the_vocabulary_are_zero_and_never_leave() -> None:
    dims = ModelDims.from_hf_config(tiny_config(), padded_vocab_size=128)
    entry = load_mapping("qwen3").bind("embedding.word_embeddings.weight", dims)
    on_disk = torch.randn(106, 64, generator=torch.Generator().manual_seed(0))
    whole = entry.from_hf([on_disk])
    assert whole.shape == (128, 64)
    assert not whole[106:].any()
    whole[106:] = 7.0
    assert torch.equal(entry.to_hf(whole)[0], on_disk)


def test_output_layer_of_a_tied_model_is_an_alias_of_the_embedding() -> None:
    mapping, dims = load_mapping("qwen3"), ModelDims.from_hf_config(tiny_config(tied=True))
    entry = mapping.bind("output_layer.weight", dims)
    assert entry.is_alias
    assert entry.hf_names == ("model.embed_tokens.weight",)
    assert "output_layer.weight" not in mapping.megatron_parameters(dims)
    assert mapping.redundant_hf_names(dims) == {"lm_head.weight"}


def test_output_layer_of_an_untied_model_is_its_own() -> None:
    mapping, dims = load_mapping("qwen3"), ModelDims.from_hf_config(tiny_config(tied=False))
    entry = mapping.bind("output_layer.weight", dims)
    assert not entry.is_alias
    assert entry.hf_names == ("lm_head.weight",)
    assert not mapping.redundant_hf_names(dims)


def test_qwen3_4b_is_covered_without_a_remainder() -> None:
    dims = ModelDims.from_hf_config(QWEN3_4B)
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (151936, 2560),
        "model.norm.weight": (2560,),
    }
    for i in range(36):
        layer = {
            "input_layernorm.weight": (2560,),
            "post_attention_layernorm.weight": (2560,),
            "self_attn.q_proj.weight": (4096, 2560),
            "self_attn.k_proj.weight": (1024, 2560),
            "self_attn.v_proj.weight": (1024, 2560),
            "self_attn.o_proj.weight": (2560, 4096),
            "self_attn.q_norm.weight": (128,),
            "self_attn.k_norm.weight": (128,),
            "mlp.gate_proj.weight": (9728, 2560),
            "mlp.up_proj.weight": (9728, 2560),
            "mlp.down_proj.weight": (2560, 9728),
        }
        expected |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    mapping = load_mapping("qwen3")
    assert mapping.hf_parameters(dims) == expected
    # The published size of Qwen3-4B: 4,022,468,096 parameters.
    assert sum(map(math.prod, expected.values())) == 4_022_468_096
    qkv = mapping.bind("decoder.layers.35.self_attention.linear_qkv.weight", dims)
    assert qkv.megatron_shape == (6144, 2560)


def test_smollm2_is_covered_without_a_remainder() -> None:
    dims = ModelDims.from_hf_config(SMOLLM2_135M)
    shapes = load_mapping("llama").hf_parameters(dims)
    assert len(shapes) == 2 + 30 * 9
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == (192, 576)
    # The published size of SmolLM2-135M.
    assert sum(map(math.prod, shapes.values())) == 134_515_008


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mlp.linear_fc1.weigh",
        "decoder.layers.2.mlp.linear_fc1.weight",
        "layers.0.mlp.linear_fc1.weight",
    ],
)
def test_unknown_name_is_refused_with_the_nearest(name: str) -> None:
    dims = ModelDims.from_hf_config(tiny_config(layers=2))
    with pytest.raises(UnknownParameter, match=r"nearest is decoder\.layers\.\d\.mlp\.linear_fc1"):
        load_mapping("qwen3").bind(name, dims)


def test_wrong_shape_names_the_parameter_and_both_shapes() -> None:
    dims = ModelDims.from_hf_config(tiny_config())
    entry = load_mapping("qwen3").bind("decoder.layers.1.mlp.linear_fc2.weight", dims)
    with pytest.raises(ShapeMismatch, match=r"layers\.1\.mlp\.down_proj.*\[64, 5\].*\[64, 192\]"):
        entry.from_hf([torch.zeros(64, 5)])
    with pytest.raises(ShapeMismatch, match=r"layers\.1\.mlp\.linear_fc2.*\[3\].*\[64, 192\]"):
        entry.to_hf(torch.zeros(3))


def test_ranks_that_do_not_divide_a_dimension_are_refused() -> None:
    dims = ModelDims.from_hf_config(tiny_config(vocab_size=107))
    entry = load_mapping("qwen3").bind("embedding.word_embeddings.weight", dims)
    with pytest.raises(ShapeMismatch, match=r"word_embeddings\.weight.*2 tensor-parallel ranks"):
        entry.shard(torch.zeros(107, 64), 0, 2)


def test_padding_below_the_vocabulary_is_refused() -> None:
    with pytest.raises(CheckpointError, match="100 cannot hold the checkpoint's 106"):
        ModelDims.from_hf_config(tiny_config(), padded_vocab_size=100)


def test_config_without_a_size_is_refused_by_its_key() -> None:
    config = tiny_config()
    del config["intermediate_size"]
    with pytest.raises(CheckpointError, match="intermediate_size"):
        ModelDims.from_hf_config(config)


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"qwen33.*qwen3"):
        load_mapping("qwen33")
