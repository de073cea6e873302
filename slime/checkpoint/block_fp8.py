"""Weights in blocks of 8-bit numbers with a scale each, as DeepSeek-V3 and R1 are published.

Both ways: read as bf16, and made from a bf16 folder.

Source: DeepSeek-V3 technical report, arXiv:2412.19437, section 3.3.2; weight = fp8 x scale of its 128 x
128 block.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slime.errors import CheckpointError

SCALE_SUFFIX = "_scale_inv"
FP8 = torch.float8_e4m3fn
_BLOCK = 128
_LARGEST = torch.finfo(FP8).max
# Projections; embeddings, norms, routers and the output layer stay as they are.
_QUANTIZED = re.compile(r"model\.layers\..*_proj(_with_mqa)?\.weight")


def is_scale(name: str) -> bool:
    """Whether this is no weight, but the scales of one."""
    return name.endswith(SCALE_SUFFIX)


def dequantized(name: str, weight: Tensor, scales: Tensor) -> Tensor:
    """[out, in] bf16, computed in fp32.

    Args:
        weight: [out, in] float8_e4m3fn.
        scales: [ceil(out / 128), ceil(in / 128)] fp32.

    Raises:
        CheckpointError: the two do not fit.
    """
    rows, columns = weight.shape
    expected = (-(-rows // _BLOCK), -(-columns // _BLOCK))
    if tuple(scales.shape) != expected:
        raise CheckpointError(
            f"{name} has scales of shape {list(scales.shape)}; blocks of {_BLOCK} x {_BLOCK} of "
            f"{list(weight.shape)} are {list(expected)}."
        )
    wide = scales.float().repeat_interleave(_BLOCK, 0)[:rows].repeat_interleave(_BLOCK, 1)
    return (weight.float() * wide[:, :columns]).to(torch.bfloat16)


def is_quantized(name: str) -> bool:
    """Whether a tensor of this name goes into blocks."""
    return _QUANTIZED.fullmatch(name) is not None


def quantized(weight: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """([out, in] float8_e4m3fn, [ceil(out / 128), ceil(in / 128)] fp32 scales).

    The largest number of a block becomes the largest of the format, 448.

    Args:
        weight: [out, in], of floating point.
        power_of_two: round scales up to one, as the format ue8m0 has them.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % _BLOCK, 0, -rows % _BLOCK))
    blocks = padded.reshape(len(padded) // _BLOCK, _BLOCK, -1, _BLOCK)
    largest = blocks.abs().amax((1, 3)).clamp(min=1e-12)
    # By a tensor: torch on CUDA takes a division by a number for a product with its reciprocal, which is off by a bit.
    scales = largest / torch.full_like(largest, _LARGEST)
    if power_of_two:
        scales = _up_to_power_of_two(scales)
    small = (blocks / scales[:, None, :, None]).clamp(-_LARGEST, _LARGEST)
    whole = small.flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return whole.to(FP8).contiguous(), scales


def _up_to_power_of_two(scales: Tensor) -> Tensor:
    """The next power of two, in the bits of fp32: logarithms differ in the last bit from device to device."""
    mantissa = (1 << 23) - 1
    return ((scales.view(torch.int32) + mantissa) & ~mantissa).view(torch.float32)


def quantization_config(*, power_of_two: bool = False) -> dict[str, Any]:
    """What `config.json` says of such a folder, as the published ones do."""
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [_BLOCK, _BLOCK],
    }
    return config | ({"scale_fmt": "ue8m0"} if power_of_two else {})
