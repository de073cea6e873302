"""Sizes of SGLang engines that cannot share a model are named before a server is started."""

import re
from pathlib import Path

import pytest
from support.config_argv import base_argv

from slime.cli.parse import parse
from slime.config.engine_rules import engine_sizes

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
