"""Engines that cannot work are named before a server is started: their sizes, and those of somebody else."""

import re
from pathlib import Path

import pytest
from support.config_argv import base_argv

from slime.cli.parse import load_config, parse
from slime.config.engine_rules import engine_sizes, external_urls
from slime.errors import ConfigError

_GROUPS = {"num_attention_heads": "4", "group_query_attention": "", "num_query_groups": "2"}
_ATTENTION = {"sglang_enable_dp_attention": ""}
_EXPERTS = {"num_experts": "8"}


def found(folder: Path, **changes: str | None) -> list[str]:
    flags = {"device": "cuda", "rollout_num_gpus": "16", "rollout_num_gpus_per_engine": "4"}
    return list(engine_sizes(parse(base_argv(folder, **(flags | _GROUPS | changes)))))


@pytest.mark.parametrize(
    "flags",
    [
        {},  # two ranks share a group of keys
        {"sglang_pp_size": "2"},
        {"rollout_num_gpus_per_engine": "8", "sglang_dp_size": "2", **_ATTENTION},
        {"sglang_ep_size": "4", **_EXPERTS},
        {"sglang_moe_dense_tp_size": "1", **_EXPERTS},
        {"sglang_moe_dense_tp_size": "4", **_EXPERTS},
        # Copies of a whole engine are no copies of its attention.
        {"sglang_dp_size": "3"},
        # Nobody generates, or not SGLang.
        {"rollout_num_gpus_per_engine": "3", "debug_train_only": ""},
        {"rollout_num_gpus_per_engine": "3", "device": "cpu"},
    ],
)
def test_sizes_that_work_pass(tmp_path: Path, flags: dict[str, str | None]) -> None:
    assert found(tmp_path, **flags) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rollout_num_gpus_per_engine": "8"}, "8 devices .* not divide --num-attention-heads 4"),
        (
            {"rollout_num_gpus_per_engine": "3", "num_attention_heads": "6"},
            "3 devices .* not divide --num-query-groups 2",
        ),
        ({"sglang_dp_size": "3", **_ATTENTION}, "--sglang-dp-size 3 does not divide the 4 devices"),
        ({"sglang_ep_size": "2"}, "--sglang-ep-size 2: the model has no experts"),
        ({"sglang_ep_size": "4", "num_experts": "6"}, "4 does not divide --num-experts 6"),
        ({"sglang_ep_size": "8", **_EXPERTS}, "--sglang-ep-size 8 does not divide the 4 devices"),
        ({"sglang_moe_dense_tp_size": "2"}, "--sglang-moe-dense-tp-size 2: SGLang knows 1 and 4"),
    ],
)
def test_sizes_that_cannot_work_are_named(
    tmp_path: Path, flags: dict[str, str | None], message: str
) -> None:
    (problem,) = found(tmp_path, **flags)
    assert re.search(message, problem)


# --- engines that somebody else runs ---

EXTERNAL: dict[str, str | None] = {"rollout_external_engine_addrs": "10.0.0.7:30000"}


def test_engines_of_others_need_no_slots_here(tmp_path: Path) -> None:
    config = load_config(base_argv(tmp_path, **EXTERNAL, rollout_num_gpus=None))
    assert config.rollout_num_gpus == 0
    assert external_urls(config) == ("http://10.0.0.7:30000",)
    assert load_config(base_argv(tmp_path, **EXTERNAL)).rollout_num_gpus == 0  # with a warning
    load_config(base_argv(tmp_path, **EXTERNAL, debug_train_only="", colocate=""))  # uses none


def test_addresses_may_be_urls(tmp_path: Path) -> None:
    argv = base_argv(tmp_path, rollout_num_gpus=None)
    argv += ["--rollout-external-engine-addrs", "http://node-7:30000/", "[fd00::7]:30000"]
    assert external_urls(load_config(argv)) == ("http://node-7:30000", "http://[fd00::7]:30000")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rollout_external_engine_addrs": "node-7"}, "node-7: give host:port"),
        ({"rollout_external_engine_addrs": "node-7:99999"}, "node-7:99999: give host:port"),
        ({"rollout_external_engine_addrs": "node-7/v1:80"}, "give host:port"),
        ({"colocate": "", "rollout_num_gpus": None}, "which the trainer cannot share"),
        ({"offload_rollout": ""}, "which the trainer cannot share"),
        ({"sglang_context_length": "512"}, "--sglang-context-length: .* start them with these"),
        ({"device": "cpu", "sglang_dp_size": "1"}, "start them with these options"),
    ],
)
def test_what_does_not_go_with_engines_of_others_is_named(
    tmp_path: Path, flags: dict[str, str | None], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(base_argv(tmp_path, **(EXTERNAL | flags)))


def test_an_address_that_is_there_twice_is_named(tmp_path: Path) -> None:
    argv = base_argv(tmp_path, rollout_num_gpus=None)
    argv += ["--rollout-external-engine-addrs", "a:1", "a:1"]
    with pytest.raises(ConfigError, match="http://a:1 is there more than once"):
        load_config(argv)


def test_the_key_of_engines_of_others_may_be_given(tmp_path: Path) -> None:
    load_config(base_argv(tmp_path, **EXTERNAL, sglang_api_key="a-key"))
