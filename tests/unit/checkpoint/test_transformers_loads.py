"""A model that went through Megatron's layout and our writer is the same model to transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.tiny_checkpoints import make_tiny_model, tiny_config
from support.tiny_families import FAMILIES, make_tiny_family
from torch import Tensor
from transformers import AutoModelForCausalLM

from slime.checkpoint.convert import count_parameters, megatron_flags_from_hf
from slime.checkpoint.hf import HfFolder, check_names
from slime.checkpoint.hf_writer import write_hf_folder
from slime.checkpoint.mapping import ModelDims, load_mapping

WITH_EXPERTS = ("qwen3_moe", "glm4_moe", "deepseek_v3")


def _logits(path: Path) -> Tensor:
    # The same code runs on both sides, so that bit-equality is a fair demand.
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_written_folder_gives_equal_logits(model_type: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(model_type, tied=tied)
    make_tiny_model(tmp_path / "origin", config)
    mapping = load_mapping(model_type)
    dims = ModelDims.from_hf_config(config, padded_vocab_size=128)
    with HfFolder(tmp_path / "origin") as folder:
        check_names(folder.names(), mapping.hf_parameters(dims), where=folder.path)
        tensors = [
            pair
            for entry in mapping.parameters(dims)
            for pair in zip(
                entry.hf_names,
                entry.to_hf(entry.from_hf([folder.tensor(name) for name in entry.hf_names])),
                strict=True,
            )
        ]
    write_hf_folder(
        tmp_path / "out", tensors, config_from=tmp_path / "origin", max_shard_bytes=200_000
    )
    before, after = _logits(tmp_path / "origin"), _logits(tmp_path / "out")
    assert before.std() > 0.1
    assert torch.equal(before, after)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_folder_saved_by_transformers_reads_the_same(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    config = tiny_config(model_type, tied=tied)
    make_tiny_model(tmp_path / "origin", config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "origin", local_files_only=True)
    model.save_pretrained(tmp_path / "saved")
    mapping, dims = load_mapping(model_type), ModelDims.from_hf_config(config)
    with HfFolder(tmp_path / "origin") as origin, HfFolder(tmp_path / "saved") as saved:
        # transformers 5 spells RoPE and dtype in other keys.
        assert ModelDims.from_hf_config(saved.config) == dims
        assert megatron_flags_from_hf(saved.config) == megatron_flags_from_hf(config)
        check_names(saved.names(), mapping.hf_parameters(dims), where=saved.path)
        assert all(torch.equal(saved.tensor(name), origin.tensor(name)) for name in saved.names())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tiny_folder_of_each_family_loads_without_a_remainder(
    model_type: str, tmp_path: Path
) -> None:
    folder = make_tiny_family(tmp_path / "tiny", model_type, vocab_size=106)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    assert not any(info.values()), info
    with HfFolder(folder) as origin:
        theirs = model.config.to_dict()
        assert ModelDims.from_hf_config(theirs) == ModelDims.from_hf_config(origin.config)
        assert megatron_flags_from_hf(theirs) == megatron_flags_from_hf(origin.config)
        assert count_parameters(origin.config) == sum(
            t.numel() for t in model.state_dict().values()
        )
    with torch.no_grad():
        assert model(torch.arange(24).view(2, 12)).logits.std() > 0.1


@pytest.mark.parametrize("keeps_stacks", [True, False])
@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_experts_saved_by_transformers_read_the_same_stacked_or_not(
    model_type: str, keeps_stacks: bool, tmp_path: Path
) -> None:
    make_tiny_family(tmp_path / "tiny", model_type, vocab_size=106)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", local_files_only=True)
    model.save_pretrained(tmp_path / "saved", save_original_format=not keeps_stacks)
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        assert ("model.layers.2.mlp.experts.gate_up_proj" in file.keys()) == keeps_stacks  # noqa: SIM118
    mapping = load_mapping(model_type)
    with HfFolder(tmp_path / "tiny") as origin, HfFolder(tmp_path / "saved") as saved:
        dims = ModelDims.from_hf_config(origin.config)
        assert ModelDims.from_hf_config(saved.config) == dims
        check_names(saved.names(), mapping.hf_parameters(dims), where=saved.path)
        for name, shape in mapping.hf_parameters(dims).items():
            assert saved.shape(name) == shape
            assert torch.equal(saved.tensor(name), origin.tensor(name)), name
