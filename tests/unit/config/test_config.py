import json
import pickle
from dataclasses import fields

import pytest

from slime.config.algo import AlgoConfig
from slime.config.config import SECTIONS, Config, slime_options
from slime.config.evaluation import EvalDataset


def test_a_config_is_each_of_its_sections() -> None:
    config = Config(eps_clip=0.3)
    assert all(isinstance(config, section) for section in SECTIONS)
    assert AlgoConfig().eps_clip == 0.2


def test_no_two_sections_have_a_field_in_common() -> None:
    names = [item.name for section in SECTIONS for item in fields(section)]
    assert len(names) == len(set(names))


def test_every_section_states_its_group_and_every_flag_its_help() -> None:
    assert len({section.__doc__ for section in SECTIONS}) == len(SECTIONS)
    for option in slime_options():
        assert option.help.endswith("."), option.name


def test_a_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_a_config_survives_pickling() -> None:
    config = Config(train_env_vars={"A": "1"}, eval_datasets=(EvalDataset(name="a", path="b"),))
    assert pickle.loads(pickle.dumps(config)) == config


def test_to_json_holds_every_field() -> None:
    config = Config(rollout_stop=("a", "b"), eval_datasets=(EvalDataset(name="a", path="b"),))
    content = json.loads(config.to_json())
    assert set(content) == {item.name for item in fields(Config)}
    assert content["rollout_stop"] == ["a", "b"]
    assert content["eval_datasets"][0]["name"] == "a"


def test_the_namespace_has_all_four_owners_and_the_facts() -> None:
    config = Config(
        rollout_stop=("a",),
        megatron_argv=("--num-attention-heads", "4", "--swiglu"),
        sglang_argv={"mem_fraction_static": 0.5, "disable_radix_cache": True},
        router_argv={"policy": "random"},
        custom={"tis_mode": "truncate"},
    )
    args = config.to_namespace(engine_urls=["http://a"], rollout_stop=["b"])
    assert (args.num_attention_heads, args.swiglu, args.squared_relu) == (4, True, False)
    assert (args.sglang_mem_fraction_static, args.sglang_disable_radix_cache) == (0.5, True)
    assert (args.sglang_tp_size, args.router_policy) == (1, "random")
    assert args.tis_mode == "truncate"
    assert args.rollout_global_dataset is True
    assert (args.engine_urls, args.rollout_stop) == (["http://a"], ["b"])


def test_tuples_are_lists_in_the_namespace() -> None:
    assert Config(rollout_stop_token_ids=(1, 2)).to_namespace().rollout_stop_token_ids == [1, 2]


def test_slime_goes_before_megatron_where_both_know_a_name() -> None:
    args = Config(lr=0.5, megatron_argv=("--lr", "0.1")).to_namespace()
    assert args.lr == 0.5
