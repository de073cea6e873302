"""Weights in blocks of 8-bit numbers with a scale each, as DeepSeek-V3 and R1 are published.

Source: DeepSeek-V3 technical report, arXiv:2412.19437, section 3.3.2; weight = fp8 x scale of its 128 x
128 block.
"""

import torch
from torch import Tensor

from slime.errors import CheckpointError

SCALE_SUFFIX = "_scale_inv"
_BLOCK = 128


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
