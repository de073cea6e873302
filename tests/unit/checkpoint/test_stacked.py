"""Stacked experts: which part of a stack is which published tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slime.checkpoint.hf import HfFolder
from slime.checkpoint.stacked import is_stack, parts_of_stack
from slime.errors import CheckpointError

PREFIX = "model.layers.5.mlp.experts"


def test_gate_lies_above_up() -> None:
    parts = parts_of_stack(f"{PREFIX}.gate_up_proj", (2, 6, 4))
    assert list(parts) == [
        f"{PREFIX}.0.gate_proj.weight",
        f"{PREFIX}.0.up_proj.weight",
        f"{PREFIX}.1.gate_proj.weight",
        f"{PREFIX}.1.up_proj.weight",
    ]
    up = parts[f"{PREFIX}.1.up_proj.weight"]
    assert (up.expert, up.rows, up.shape) == (1, slice(3, 6), (3, 4))


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}.0.down_proj.weight",
        "model.layers.5.mlp.gate_up_proj.weight",
        "model.layers.5.mlp.shared_experts.down_proj.weight",
    ],
)
def test_other_names_are_no_stack(name: str) -> None:
    assert not is_stack(name)


def test_folder_gives_single_experts_and_reads_them_from_the_stack(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    gate_up, down = torch.randn(3, 8, 5), torch.randn(3, 5, 4)
    tensors = {f"{PREFIX}.gate_up_proj": gate_up, f"{PREFIX}.down_proj": down}
    save_file(tensors | {"lm_head.weight": torch.zeros(2, 5)}, tmp_path / "model.safetensors")
    with HfFolder(tmp_path) as folder:
        assert len(folder.names()) == 1 + 3 * 3
        assert folder.shape(f"{PREFIX}.2.gate_proj.weight") == (4, 5)
        assert torch.equal(folder.tensor(f"{PREFIX}.2.gate_proj.weight"), gate_up[2, :4])
        assert torch.equal(folder.tensor(f"{PREFIX}.1.up_proj.weight"), gate_up[1, 4:])
        assert torch.equal(folder.tensor(f"{PREFIX}.0.down_proj.weight"), down[0])
        with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj"):
            folder.tensor(f"{PREFIX}.3.down_proj.weight")
