"""Whether a model folder keeps its weights in 8 bits, and in a form that a weight sync can make."""

from typing import Any, cast

from slime.config.checkpoints import is_hf_folder, read_hf_config
from slime.errors import ConfigError

BLOCK = [128, 128]


def is_quantized_checkpoint(folder: str | None) -> bool:
    """Whether `config.json` of a model folder says that its weights are quantized."""
    return bool(folder and is_hf_folder(folder) and quantization_of(folder))


def quantization_of(folder: str) -> dict[str, Any]:
    """`quantization_config` of a model folder; empty without one.

    Raises:
        ConfigError: config.json cannot be read.
    """
    found = read_hf_config(folder).get("quantization_config")
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def check_block_fp8(folder: str) -> None:
    """Nothing, when weights can be made in the form of this folder: 8 bits in blocks of 128 x 128, or as they are.

    Raises:
        ConfigError: it is quantized in another way.
    """
    found = quantization_of(folder)
    if not found:
        return
    wanted = {"quant_method": "fp8", "weight_block_size": BLOCK, "activation_scheme": "dynamic"}
    usual: dict[str, Any] = {"activation_scheme": "dynamic", "fmt": "e4m3"}
    words = {key: found.get(key, usual.get(key)) for key in (*wanted, "fmt")}
    differs = {k: v for k, v in words.items() if v != (wanted | {"fmt": "e4m3"})[k]}
    if differs or found.get("scale_fmt") not in (None, "ue8m0"):
        shown = ", ".join(f"{key} {value}" for key, value in (differs or found).items())
        raise ConfigError(
            f"--hf-checkpoint {folder} is quantized ({shown}); a weight sync makes fp8 (e4m3) in blocks of 128 x "
            "128 with dynamic activations only, as tools/convert_hf_to_fp8.py writes it. Convert the bf16 model "
            "with that tool, or take the bf16 model itself"
        )
