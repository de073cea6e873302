import json
from pathlib import Path

import pytest
from support.config_argv import HF_CONFIG, base_argv

from slime.cli.parse import load_config
from slime.errors import ConfigError

MATCHING = (
    *("--hidden-size", "64", "--num-attention-heads", "4", "--num-query-groups", "2"),
    *("--kv-channels", "16", "--ffn-hidden-size", "128", "--norm-epsilon", "1e-6"),
    *("--rotary-base", "1000000"),
)


def test_flags_that_describe_the_model_pass(tmp_path: Path) -> None:
    load_config([*base_argv(tmp_path), *MATCHING])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-layers", "3"], r"--num-layers 3 \(config.json: num_hidden_layers 2\)"),
        (["--rotary-base", "10000"], r"--rotary-base 10000 \(config.json: rope_theta 1000000.0\)"),
        (["--norm-epsilon", "1e-5"], "rms_norm_eps 1e-06"),
        (["--untie-embeddings-and-output-weights"], "tie_word_embeddings True"),
    ],
)
def test_differences_are_listed(tmp_path: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([*base_argv(tmp_path), *argv])


def test_all_differences_come_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--num-layers 3.*--kv-channels 8"):
        load_config([*base_argv(tmp_path), "--num-layers", "3", "--kv-channels", "8"])


def test_missing_model_flags_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model's flags are missing"):
        load_config(base_argv(tmp_path, num_layers=None))


def test_an_untied_model_needs_the_flag(tmp_path: Path) -> None:
    argv = base_argv(tmp_path)
    untied = HF_CONFIG | {"tie_word_embeddings": False}
    (tmp_path / "model" / "config.json").write_text(json.dumps(untied))
    with pytest.raises(ConfigError, match="--untie-embeddings-and-output-weights not given"):
        load_config(argv)
    load_config([*argv, "--untie-embeddings-and-output-weights"])


def test_a_multimodal_model_is_compared_by_its_text_part(tmp_path: Path) -> None:
    argv = base_argv(tmp_path)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"text_config": HF_CONFIG}))
    with pytest.raises(ConfigError, match="num_hidden_layers 2"):
        load_config([*argv, "--num-layers", "3"])


def test_a_broken_config_json_is_named(tmp_path: Path) -> None:
    argv = base_argv(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json"):
        load_config(argv)
