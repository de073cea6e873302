"""The trainer's weights in the form of a rollout checkpoint that keeps some of them in 8 bits."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from slime.checkpoint.block_fp8 import SCALE_SUFFIX, quantized
from slime.checkpoint.hf import HfFolder
from slime.config.quantization import check_block_fp8, quantization_of
from slime.errors import CheckpointError

_FP8 = "F8_E4M3"
_SCALE = "F32"
_PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Fp8Format:
    """Which tensors of a checkpoint are in blocks of 8-bit numbers, and what the others are.

    Attributes:
        folder: the checkpoint, for messages.
        dtypes: of every tensor in its files, scales too, as safetensors spells them.
        power_of_two: scales are powers of two.
    """

    folder: str
    dtypes: Mapping[str, str]
    power_of_two: bool = False

    @classmethod
    def read(cls, folder: str) -> Self | None:
        """The form of a folder; None when its weights are as a trainer has them.

        Raises:
            ConfigError: it is quantized in another way than in blocks of 128 x 128.
            CheckpointError: its files do not hold what config.json says.
        """
        check_block_fp8(folder)
        config = quantization_of(folder)
        if not config:
            return None
        with HfFolder(folder) as files:
            dtypes = files.stored_dtypes()
        for name, dtype in dtypes.items():
            scale = dtypes.get(f"{name}{SCALE_SUFFIX}")
            if dtype.startswith("F8") and (dtype, scale) != (_FP8, _SCALE):
                raise CheckpointError(
                    f"{folder}: {name} is {dtype} with scales of {scale}; in blocks of 8 bits weights are {_FP8} "
                    f"and their scales {_SCALE}"
                )
        return cls(folder, dtypes, config.get("scale_fmt") == "ue8m0")

    def of(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) as the checkpoint has them, each where the trainer's tensor is.

        The bits are those of `tools/convert_hf_to_fp8.py`.

        Raises:
            CheckpointError: the checkpoint has no tensor of that name.
        """
        for name, tensor in named:
            dtype = self.dtypes.get(name)
            if dtype is None:
                raise CheckpointError(
                    f"{self.folder} has no tensor {name}, which the trainer has; is it the same model?"
                )
            if dtype == _FP8:
                small, scales = quantized(tensor, power_of_two=self.power_of_two)
                yield name, small
                yield f"{name}{SCALE_SUFFIX}", scales
            else:
                # Precision is lost where the trainer keeps more than the engine loads: as in any checkpoint.
                yield name, tensor.to(_PLAIN.get(dtype, tensor.dtype))
