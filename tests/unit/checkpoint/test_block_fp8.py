"""Folders in blocks of 8 bits: read as bf16, their scales unseen."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_families import make_tiny_family

from slime.checkpoint.block_fp8 import dequantized, is_quantized, quantized
from slime.checkpoint.folders import hf_to_fp8, hf_to_torch_dist, megatron_to_hf
from slime.checkpoint.hf import HfFolder
from slime.errors import CheckpointError


def by_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp8, scales) block by block, written out."""
    rows, columns = weight.shape
    result = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].float()
            scales[i, j] = block.abs().max() / 448.0
            result[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = (block / scales[i, j]).to(
                torch.float8_e4m3fn
            )
    return result, scales


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 5), (7, 300)])
def test_a_weight_is_its_block_times_the_scale(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    small, scales = by_blocks(weight)
    found = dequantized("w", small, scales)
    assert found.dtype == torch.bfloat16
    row, column = shape[0] - 1, shape[1] - 1
    expected = float(small[row, column].float()) * float(scales[row // 128, column // 128])
    assert float(found[row, column]) == pytest.approx(expected, rel=2**-8)
    # e4m3 has 3 bits after the first: 2^-4 of each number.
    torch.testing.assert_close(found.float(), weight, rtol=2**-4 + 2**-8, atol=2e-2)


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"w has scales of shape \[1, 1\]; .* are \[2, 1\]"):
        dequantized("w", torch.zeros(200, 100, dtype=torch.float8_e4m3fn), torch.ones(1, 1))


def test_an_fp8_folder_converts_as_its_bf16_numbers(tmp_path: Path) -> None:
    plain = Path(make_tiny_family(tmp_path / "plain", "deepseek_v3", vocab_size=106))
    tensors: dict[str, torch.Tensor] = {}
    with HfFolder(plain) as folder:
        for name in folder.names():
            tensor = folder.tensor(name)
            if "_proj" in name and tensor.dim() == 2:
                tensors[name], tensors[f"{name}_scale_inv"] = by_blocks(tensor)
            else:
                tensors[name] = tensor
    small = tmp_path / "fp8"
    small.mkdir()
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (small / "config.json").write_text(json.dumps(config))
    save_file(tensors, small / "model.safetensors", {"format": "pt"})

    hf_to_torch_dist(small, tmp_path / "saved")
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", origin=small)
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    with HfFolder(small) as read, HfFolder(tmp_path / "back") as back, HfFolder(plain) as origin:
        assert set(read.names()) == set(back.names()) == set(origin.names())
        for name in origin.names():
            found = back.tensor(name)
            assert torch.equal(found, read.tensor(name)), name
            assert found.dtype == (torch.bfloat16 if "_proj" in name else torch.float32)


@pytest.mark.parametrize("shape", [(128, 128), (130, 5), (7, 300), (256, 129)])
def test_quantizing_is_that_of_each_block(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape).bfloat16()
    small, scales = quantized(weight)
    expected, by_hand = by_blocks(weight)
    torch.testing.assert_close(scales, by_hand)
    assert torch.equal(small.float(), expected.float())


def test_scales_can_be_powers_of_two() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(2))
    small, scales = quantized(weight, power_of_two=True)
    assert torch.equal(torch.log2(scales), torch.log2(scales).round())
    found = dequantized("w", small, scales).float()
    torch.testing.assert_close(found, weight, rtol=2**-4 + 2**-8, atol=2e-2)


def test_a_block_of_zeros_stays_zero() -> None:
    small, scales = quantized(torch.zeros(128, 128))
    assert not dequantized("w", small, scales).any()


def test_a_folder_becomes_fp8_and_reads_back_near(tmp_path: Path) -> None:
    plain = Path(make_tiny_family(tmp_path / "plain", "qwen3_moe", vocab_size=106))
    hf_to_fp8(plain, tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert "model.layers.0.mlp.gate" in config["quantization_config"]["modules_to_not_convert"]
    assert config["torch_dtype"] == "float32"
    with HfFolder(plain) as origin, HfFolder(tmp_path / "fp8") as found:
        assert set(found.names()) == set(origin.names())
        for name in origin.names():
            one, two = origin.tensor(name), found.tensor(name)
            if is_quantized(name):
                torch.testing.assert_close(two.float(), one, rtol=2**-4 + 2**-8, atol=2e-2)
                assert not torch.equal(two.float(), one)
            else:
                assert torch.equal(two, one), name
    with pytest.raises(CheckpointError, match="quantized already"):
        hf_to_fp8(tmp_path / "fp8", tmp_path / "again")
