"""The trainer's weights as a rollout checkpoint in 8 bits has them: the bits that the converter writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.device import DEVICE
from support.tiny_families import make_tiny_family
from torch import Tensor

from slime.checkpoint.block_fp8 import quantized
from slime.checkpoint.folders import hf_to_fp8
from slime.checkpoint.fp8_format import Fp8Format
from slime.checkpoint.hf import HfFolder
from slime.errors import CheckpointError, ConfigError


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors in the files of a folder, scales too."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.fixture(params=["qwen3", "qwen3_moe", "deepseek_v3", "glm4_moe"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(make_tiny_family(tmp_path / "plain", request.param, vocab_size=106))


@pytest.mark.trainer
@pytest.mark.parametrize("power_of_two", [False, True])
def test_every_tensor_has_the_bits_that_the_converter_writes(
    plain: Path, tmp_path: Path, power_of_two: bool
) -> None:
    hf_to_fp8(plain, tmp_path / "fp8", power_of_two=power_of_two)
    form = Fp8Format.read(str(tmp_path / "fp8"))
    assert form is not None
    with HfFolder(plain) as folder:
        named = ((name, folder.tensor(name).to(DEVICE)) for name in folder.names())
        found = {name: tensor.cpu() for name, tensor in form.of(named)}
    expected = stored(tmp_path / "fp8")
    assert found.keys() == expected.keys()
    small = [name for name, tensor in expected.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(small) > 5
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        one, two = (t.contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(one, two), name


def test_what_is_not_quantized_gets_the_checkpoints_dtype(tmp_path: Path) -> None:
    plain = Path(make_tiny_family(tmp_path / "plain", "qwen3", vocab_size=106))
    hf_to_fp8(plain, tmp_path / "fp8")
    tensors = stored(tmp_path / "fp8")
    changed = {
        name: tensor.bfloat16() if tensor.dtype == torch.float32 and "scale" not in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(changed, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    form = Fp8Format.read(str(tmp_path / "fp8"))
    assert form is not None
    with HfFolder(plain) as folder:
        found = dict(form.of((name, folder.tensor(name)) for name in folder.names()))
    assert {name: t.dtype for name, t in found.items()} == {n: t.dtype for n, t in changed.items()}
    assert found["model.norm.weight"].dtype == torch.bfloat16


def test_a_folder_that_is_not_quantized_has_no_form(tmp_path: Path) -> None:
    plain = make_tiny_family(tmp_path / "plain", "qwen3", vocab_size=106)
    assert Fp8Format.read(str(plain)) is None


def test_a_weight_that_the_checkpoint_lacks_is_named() -> None:
    form = Fp8Format("/fp8", {"a.weight": "BF16"})
    with pytest.raises(CheckpointError, match=r"/fp8 has no tensor b\.weight"):
        list(form.of([("a.weight", torch.ones(2)), ("b.weight", torch.ones(2))]))


def test_other_kinds_of_8_bits_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(config))
    small = torch.ones(4, 4).to(torch.float8_e4m3fn)
    for tensors, message in (
        ({"w": small}, "w is F8_E4M3 with scales of None"),
        ({"w": small, "w_scale_inv": torch.ones(1, 1).bfloat16()}, "scales of BF16"),
        ({"w": small.to(torch.float8_e5m2), "w_scale_inv": torch.ones(1, 1)}, "w is F8_E5M2"),
    ):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            Fp8Format.read(str(folder))
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    with pytest.raises(ConfigError, match="is quantized"):
        Fp8Format.read(str(folder))


def test_scales_of_a_power_of_two_are_never_too_small() -> None:
    """Exact, and the next one above a power of two is the next power."""
    for largest in (448.0, 448.0 * 2**-20, 3.0, 447.9, 448.1, 1e-30):
        weight = torch.zeros(128, 128)
        weight[5, 7] = largest
        small, scales = quantized(weight, power_of_two=True)
        scale = float(scales)
        assert torch.frexp(scales).mantissa.item() == 0.5
        assert scale * 448.0 >= max(largest, 1e-12) * (1 - 2**-23)
        assert scale / 2 * 448.0 < max(largest, 1e-12)
        assert abs(float(small[5, 7].float()) * scale - largest) <= largest * 2**-4 + 1e-12
