"""Rules about how weights reach the engines."""

from collections.abc import Iterator
from pathlib import Path

from slime.config.checkpoints import is_hf_folder
from slime.config.config import Config
from slime.config.quantization import check_block_fp8, is_quantized_checkpoint
from slime.errors import ConfigError

_TRANSPORT = "--update-weight-transport disk"
_DIR = "--update-weight-disk-dir"
_LOCAL = "--update-weight-local-checkpoint-dir"


def weights_through_files(config: Config) -> Iterator[str]:
    """What is wrong with the flags of --update-weight-transport disk."""
    is_delta, is_disk = (
        config.update_weight_mode == "delta",
        config.update_weight_transport == "disk",
    )
    local_dir = config.update_weight_local_checkpoint_dir
    if is_delta and not is_disk:
        yield f"--update-weight-mode delta: what changed goes through files only; give {_TRANSPORT} and {_DIR}"
    if is_delta and local_dir is None:
        yield (
            f"--update-weight-mode delta needs {_LOCAL}: a folder on each engine's host for the copy that "
            "changes are made to"
        )
    if is_delta and config.colocate:
        yield "--update-weight-mode delta and --colocate exclude each other: on one card weights never leave it"
    if is_disk and config.update_weight_disk_dir is None:
        yield f"{_TRANSPORT} needs {_DIR}: a folder that the trainer's and all engines' hosts share"
    yield from _places(config)


def _places(config: Config) -> Iterator[str]:
    """Folders that would be written over, or read half-written."""
    flags = {
        _DIR: config.update_weight_disk_dir,
        _LOCAL: config.update_weight_local_checkpoint_dir,
        "--hf-checkpoint": config.hf_checkpoint,
    }
    paths = {name: Path(value).resolve() for name, value in flags.items() if value is not None}
    for one, other in ((_DIR, "--hf-checkpoint"), (_LOCAL, "--hf-checkpoint"), (_LOCAL, _DIR)):
        if one in paths and other in paths and paths[one] == paths[other]:
            yield f"{one} and {other} are the same folder, {paths[one]}; name another one"


def quantized_weights(config: Config) -> Iterator[str]:
    """What is wrong with a rollout checkpoint in 8 bits."""
    folder, is_rolling = config.hf_checkpoint, not config.debug_train_only
    if not is_rolling or folder is None or not is_hf_folder(folder):
        return
    try:
        check_block_fp8(folder)
    except ConfigError as error:
        yield str(error)
        return
    if is_quantized_checkpoint(folder) and config.device == "cpu":
        yield (
            f"--hf-checkpoint {folder} holds weights in 8 bits, and no engine computes with them on a CPU; give the "
            "model in bf16"
        )
    online = config.sglang_argv.get("quantization")
    if online is not None and not is_quantized_checkpoint(folder) and not config.debug_rollout_only:
        yield (
            f"--sglang-quantization {online}: SGLang would quantize what it loads itself, and take the weights of "
            "a sync for what it made; convert --hf-checkpoint with tools/convert_hf_to_fp8.py instead"
        )
