"""Weights are loaded under their checkpoint names, whole or not at all, and verified."""

import base64
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from support.tiny_models import tiny_model

from slime.engines.checksum import checksum
from slime.engines.embedded.model import load_model
from slime.engines.embedded.weights import ParameterStore
from slime.errors import CheckpointError, EngineError, ShapeMismatch, UnknownParameter

MODELS = ("qwen3", "qwen3_tied", "olmo2", "qwen3_moe", "glm4_moe", "deepseek_v3")


def state(model: object) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_another_seed_makes_the_model_that_of_this_seed(
    name: str, tmp_path: Path
) -> None:
    other = tiny_model(name, seed=1)
    other.save_pretrained(tmp_path)
    model = tiny_model(name)
    sums = ParameterStore(model).load_files(str(tmp_path))
    wanted = other.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())
    files = load_file(tmp_path / "model.safetensors")
    assert sums == {key: checksum(tensor) for key, tensor in files.items()}


def test_experts_are_loaded_one_by_one_and_stacked() -> None:
    model = tiny_model("qwen3_moe")
    store = ParameterStore(model)
    stacked = model.model.layers[0].mlp.experts
    gate = torch.randn(32, 64)
    store.load([("model.layers.0.mlp.experts.3.gate_proj.weight", gate)])
    assert torch.equal(stacked.gate_up_proj[3, :32], gate)
    down = torch.randn_like(stacked.down_proj)
    sums = store.load([("model.layers.0.mlp.experts.down_proj", down)])
    assert torch.equal(stacked.down_proj, down)
    assert sums == {"model.layers.0.mlp.experts.down_proj": checksum(down)}


def test_tied_embeddings_are_loaded_under_either_name() -> None:
    model = tiny_model("qwen3_tied")
    store = ParameterStore(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new = torch.randn(64, 64)
        store.load([(name, new)])
        assert torch.equal(model.model.embed_tokens.weight, new)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_checksum_is_of_what_the_model_holds_in_the_dtype_that_came() -> None:
    model = tiny_model("qwen3")
    store = ParameterStore(model)
    sent = torch.randn(64).to(torch.bfloat16)
    assert store.load([("model.norm.weight", sent)]) == {"model.norm.weight": checksum(sent)}
    half = ParameterStore(tiny_model("qwen3").to(torch.bfloat16))
    fine = torch.randn(64)
    # A bf16 model cannot hold fp32 values, and the checksum says so.
    assert half.load([("model.norm.weight", fine)]) != {"model.norm.weight": checksum(fine)}


def encoded(**tensors: torch.Tensor) -> str:
    return base64.b64encode(save(tensors)).decode()


def test_tensors_in_a_request_are_safetensors_bytes() -> None:
    model = tiny_model("qwen3")
    new = torch.randn(64)
    sums = ParameterStore(model).load_parts([encoded(**{"model.norm.weight": new})])
    assert torch.equal(model.model.norm.weight, new)
    assert sums == {"model.norm.weight": checksum(new)}
    with pytest.raises(CheckpointError, match="no safetensors"):
        ParameterStore(model).load_parts([base64.b64encode(b"x" * 20).decode()])


def test_an_unknown_name_or_a_wrong_shape_leaves_the_model_as_it_was() -> None:
    model = tiny_model("qwen3")
    before = state(model)
    store = ParameterStore(model)
    good = {"model.norm.weight": torch.randn(64)}
    with pytest.raises(UnknownParameter, match="'nobody'"):
        store.load_parts([encoded(**good), encoded(nobody=torch.ones(1))])
    with pytest.raises(ShapeMismatch, match=r"'lm_head.weight' has shape \[3\]"):
        store.load_parts([encoded(**good, **{"lm_head.weight": torch.ones(3)})])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_an_incomplete_folder_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    del files["model.layers.1.mlp.experts.7.up_proj.weight"]
    save_file(files, tmp_path / "model.safetensors")
    before = state(model)
    with pytest.raises(CheckpointError, match=r"lacks 1 .*experts\.7\.up_proj"):
        ParameterStore(model).load_files(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ParameterStore(model).load_files(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        ParameterStore(model).load_files(str(tmp_path))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_folder_of_quantized_weights_is_refused_by_name(tmp_path: Path) -> None:
    config = {"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"quantized weights, which the embedded engine"):
        load_model(str(tmp_path), dtype=torch.float32)
