"""How a stock SGLang server is started as an engine."""

import importlib.util
import json
import socket
import stat
from pathlib import Path

import pytest
from support.config_argv import base_argv

from slime.cli.parse import load_config
from slime.config.config import Config
from slime.engines.servers import NodePart, ServerSpec
from slime.engines.sglang import launch as launching
from slime.engines.sglang.invitation import RECEIVER
from slime.errors import ConfigError

KEY = "a-key-that-nobody-else-may-read"


@pytest.fixture(autouse=True)
def sglang_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def config(folder: Path, **changes: str | None) -> Config:
    return load_config(base_argv(folder, **{"rollout_engine": "sglang", **changes}))


def start(folder: Path, part: NodePart | None = None, /, **changes: str | None) -> ServerSpec:
    return launching.launch(
        config(folder, **changes),
        index=3,
        host="127.0.0.1",
        port=4000,
        log_dir=folder / "logs",
        part=part,
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


def test_ranks_meet_at_a_port_kept_for_them(tmp_path: Path) -> None:
    port = int(value(start(tmp_path), "--nccl-port"))
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    assert "--nccl-port" not in start(tmp_path, NodePart(0, 2, "127.0.0.1:5000")).command


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


WIDE = {"device": "cuda", "rollout_num_gpus": "16", "rollout_num_gpus_per_engine": "16"}


def test_the_parts_of_an_engine_meet_at_its_first_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "SGLANG_HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    specs = [start(tmp_path, NodePart(rank, 2, "10.0.0.1:5000"), **WIDE) for rank in range(2)]
    for rank, spec in enumerate(specs):
        assert (value(spec, "--nnodes"), value(spec, "--node-rank")) == ("2", str(rank))
        assert value(spec, "--dist-init-addr") == "10.0.0.1:5000"
        assert (value(spec, "--tp-size"), value(spec, "--random-seed")) == ("16", "1237")
        assert spec.env["SGLANG_HOST_IP"] == "127.0.0.1"
        assert spec.env["GLOO_SOCKET_IFNAME"] == "lo"  # the interface of this node's address
    assert [spec.name for spec in specs] == ["engine-3", "engine-3-node-1"]
    assert len({spec.log_path for spec in specs}) == 2


def test_an_interface_that_the_user_chose_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "bond0")
    monkeypatch.setenv("SGLANG_HOST_IP", "10.0.0.9")
    spec = start(tmp_path, NodePart(1, 2, "10.0.0.1:5000"), **WIDE)
    assert not {"GLOO_SOCKET_IFNAME", "SGLANG_HOST_IP"} & set(spec.env)


def test_an_engine_on_one_node_hears_of_no_other(tmp_path: Path) -> None:
    spec = start(tmp_path, device="cuda")
    assert not {"--nnodes", "--node-rank", "--dist-init-addr"} & set(spec.command)


def test_ranks_on_cpus_have_a_core_each_and_no_nccl(tmp_path: Path) -> None:
    spec = start(tmp_path, rollout_num_gpus_per_engine="2", device="cpu")
    assert len(spec.env["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 2
    assert spec.env["SGLANG_NCCL_SO_PATH"] == "/dev/null"
    assert "SGLANG_NCCL_SO_PATH" not in start(tmp_path, device="cpu").env
