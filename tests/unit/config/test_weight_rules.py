"""Which ways for weights the flags may name."""

import json
import logging
from pathlib import Path

import pytest
from support.config_argv import base_argv

from slime.cli.parse import load_config
from slime.config.quantization import is_quantized_checkpoint
from slime.errors import ConfigError

DISK = {"update_weight_transport": "disk", "update_weight_disk_dir": "/versions"}
DELTA = {**DISK, "update_weight_mode": "delta", "update_weight_local_checkpoint_dir": "/local"}
BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"update_weight_transport": "disk"}, "disk needs --update-weight-disk-dir"),
        ({"update_weight_mode": "delta"}, "delta: what changed goes through files only"),
        (
            {**DELTA, "update_weight_local_checkpoint_dir": None},
            "delta needs --update-weight-local-checkpoint-dir",
        ),
        (
            {**DELTA, "colocate": "", "rollout_num_gpus": None},
            "delta and --colocate exclude each other",
        ),
        (
            {**DELTA, "update_weight_local_checkpoint_dir": "/versions/"},
            "--update-weight-local-checkpoint-dir and --update-weight-disk-dir are the same folder",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, flags: dict[str, str | None], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(base_argv(tmp_path, **flags))


@pytest.mark.parametrize("flags", [DISK, DELTA])
def test_the_documented_flags_are_taken(tmp_path: Path, flags: dict[str, str | None]) -> None:
    config = load_config(base_argv(tmp_path, **flags))
    assert config.update_weight_disk_dir == "/versions"


def test_the_model_is_not_written_over(tmp_path: Path) -> None:
    flags = {**DISK, "update_weight_disk_dir": str(tmp_path / "model")}
    with pytest.raises(ConfigError, match="and --hf-checkpoint are the same folder"):
        load_config(base_argv(tmp_path, **flags))


def test_flags_of_files_do_nothing_without_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_config(
            base_argv(
                tmp_path,
                update_weight_disk_dir="/versions",
                update_weight_delta_encoding="overwrite",
            )
        )
    assert "--update-weight-disk-dir has no effect without --update-weight-transport disk" in (
        caplog.text
    )
    assert "--update-weight-delta-encoding has no effect without --update-weight-mode delta" in (
        caplog.text
    )


def quantize(folder: Path, **changes: object) -> None:
    """Write into config.json that the weights are."""
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": BLOCK_FP8 | changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_block_size": None}, "weight_block_size None"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        ({"quant_method": "awq"}, "quant_method awq"),
        ({"activation_scheme": "static"}, "activation_scheme static"),
        ({"fmt": "e5m2"}, "fmt e5m2"),
        ({"scale_fmt": "float8"}, "scale_fmt float8"),
    ],
)
def test_a_checkpoint_quantized_in_a_way_that_no_sync_makes_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    argv = base_argv(tmp_path)
    quantize(tmp_path, **changes)
    with pytest.raises(ConfigError, match=f"is quantized .*{message}.*convert_hf_to_fp8"):
        load_config(argv)


@pytest.mark.parametrize("changes", [{}, {"scale_fmt": "ue8m0"}, {"activation_scheme": "dynamic"}])
def test_blocks_of_8_bits_are_taken(tmp_path: Path, changes: dict[str, object]) -> None:
    argv = base_argv(tmp_path)
    assert not is_quantized_checkpoint(str(tmp_path / "model"))
    quantize(tmp_path, **changes)
    load_config(argv)
    assert is_quantized_checkpoint(str(tmp_path / "model"))


def test_8_bits_need_a_gpu(tmp_path: Path) -> None:
    argv = base_argv(tmp_path, device="cpu")
    quantize(tmp_path)
    with pytest.raises(ConfigError, match="no engine computes with them on a CPU"):
        load_config(argv)
    load_config([*argv, "--debug-train-only"])


def test_quantizing_in_the_engine_is_refused(tmp_path: Path) -> None:
    argv = base_argv(tmp_path, rollout_engine="sglang", sglang_quantization="fp8")
    with pytest.raises(ConfigError, match="--sglang-quantization fp8: SGLang would quantize"):
        load_config(argv)
