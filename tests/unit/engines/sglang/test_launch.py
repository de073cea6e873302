"""How a stock SGLang server is started as an engine."""

import importlib.util
import json
import stat
from pathlib import Path

import pytest
from support.config_argv import base_argv

from slime.cli.parse import load_config
from slime.config.config import Config
from slime.engines.servers import ServerSpec
from slime.engines.sglang import launch as launching
from slime.engines.sglang.invitation import RECEIVER
from slime.errors import ConfigError

KEY = "a-key-that-nobody-else-may-read"


@pytest.fixture(autouse=True)
def sglang_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def config(folder: Path, **changes: str | None) -> Config:
    return load_config(base_argv(folder, **{"rollout_engine": "sglang", **changes}))


def start(folder: Path, **changes: str | None) -> ServerSpec:
    return launching.launch(
        config(folder, **changes), index=3, host="127.0.0.1", port=4000, log_dir=folder / "logs"
    )


def value(spec: ServerSpec, flag: str) -> str:
    return spec.command[spec.command.index(flag) + 1]


def test_our_receiver_stands_beside_loaders_of_the_users(tmp_path: Path) -> None:
    assert value(start(tmp_path), "--custom-weight-loader") == RECEIVER
    spec = start(tmp_path, sglang_custom_weight_loader="my.loader")
    place = spec.command.index("--custom-weight-loader")
    assert spec.command[place + 1 : place + 3] == ("my.loader", RECEIVER)


def test_sizes_seed_and_address_follow_from_the_run(tmp_path: Path) -> None:
    spec = start(
        tmp_path, device="cuda", rollout_num_gpus_per_engine="2", rollout_num_gpus="2", seed="40"
    )
    assert (value(spec, "--tp-size"), value(spec, "--random-seed")) == ("2", "43")
    assert (value(spec, "--host"), value(spec, "--port"), spec.url) == (
        "127.0.0.1", "4000", "http://127.0.0.1:4000",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"device": "cpu"}, "float32"),
        ({"device": "cuda"}, "bfloat16"),
        ({"device": "cuda", "sglang_dtype": "float16"}, "float16"),
    ],
)
def test_engines_compute_as_the_trainer_does_unless_told(
    tmp_path: Path, changes: dict[str, str], dtype: str
) -> None:
    assert value(start(tmp_path, **changes), "--dtype") == dtype


def test_memory_can_be_released_where_engines_leave(tmp_path: Path) -> None:
    shared = {"colocate": "", "rollout_num_gpus": None}
    assert "--enable-memory-saver" in start(tmp_path, device="cuda", **shared).command
    assert "--enable-memory-saver" not in start(tmp_path, device="cuda").command
    assert "--enable-memory-saver" not in start(tmp_path, device="cpu", **shared).command


def test_the_key_is_in_a_private_file_and_on_no_command_line(tmp_path: Path) -> None:
    for _ in range(2):  # a server that is started again
        spec = start(tmp_path, sglang_api_key=KEY)
        assert not [word for word in spec.command if KEY in word]
        file = Path(value(spec, "--config"))
        assert file.suffix == ".yaml"  # SGLang reads no other
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert json.loads(file.read_text()) == {"api-key": KEY}


def test_a_node_without_sglang_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="make setup-gpu"):
        start(tmp_path)
