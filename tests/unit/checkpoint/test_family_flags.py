"""Flags of GLM-4, experts and latent attention: Megatron's own parser, documented ones, refusals."""

import argparse
import functools
from argparse import Namespace
from typing import Any

import pytest
from support.published_configs import (
    DEEPSEEK_R1,
    GLM4_9B,
    GLM45_355B,
    GLM45_AIR,
    MOONLIGHT,
    QWEN3_30B_A3B,
)
from support.tiny_families import FAMILIES, tiny_family_config

from slime.checkpoint.convert import check_hf_against_flags, megatron_flags_from_hf
from slime.checkpoint.settings import effective_value, layer_pattern
from slime.config.foreign import megatron_values
from slime.errors import ConfigError

PUBLISHED = {
    "glm4-9B": GLM4_9B,
    "qwen3-30B-A3B": QWEN3_30B_A3B,
    "glm4.5-355B-A32B": GLM45_355B,
    "glm4.5-106B-A12B": GLM45_AIR,
    "deepseek-r1": DEEPSEEK_R1,
    "moonlight": MOONLIGHT,
}

# Rows of the table of MODEL_ARGS that users of slime know.
DOCUMENTED = {
    "glm4-9B": (
        "--num-layers 40",
        "--ffn-hidden-size 13696",
        "--num-query-groups 2",
        "--rotary-base 10000",
        "--rotary-percent 0.5",
        "--rotary-interleaved",
        "--add-qkv-bias",
        "--vocab-size 151552",
        "--untie-embeddings-and-output-weights",
    ),
    "qwen3-30B-A3B": (
        "--num-experts 128",
        "--moe-layer-freq [1]*48",
        "--moe-ffn-hidden-size 768",
        "--moe-router-topk 8",
        "--moe-router-score-function softmax",
        "--moe-router-dtype fp32",
        "--qk-layernorm",
        "--kv-channels 128",
    ),
    "glm4.5-355B-A32B": (
        "--moe-layer-freq [0]*3+[1]*89",
        "--moe-shared-expert-intermediate-size 1536",
        "--moe-router-score-function sigmoid",
        "--moe-router-pre-softmax",
        "--moe-router-enable-expert-bias",
        "--moe-router-bias-update-rate 0",
        "--moe-router-topk-scaling-factor 2.5",
        "--moe-aux-loss-coeff 0",
        "--rotary-percent 0.5",
        "--qk-layernorm",
        "--add-qkv-bias",
    ),
    "glm4.5-106B-A12B": ("--moe-layer-freq [0]*1+[1]*45", "--moe-ffn-hidden-size 1408"),
    "deepseek-r1": (
        "--multi-latent-attention",
        "--q-lora-rank 1536",
        "--kv-lora-rank 512",
        "--qk-head-dim 128",
        "--qk-pos-emb-head-dim 64",
        "--v-head-dim 128",
        "--kv-channels 128",
        "--rotary-scaling-factor 40",
        "--mscale 1.0",
        "--mscale-all-dim 1.0",
        "--moe-layer-freq [0]*3+[1]*58",
        "--moe-router-num-groups 8",
        "--moe-router-group-topk 4",
        "--moe-router-topk-scaling-factor 2.5",
    ),
    "moonlight": ("--rotary-base 50000", "--moe-shared-expert-intermediate-size 2816"),
}
ABSENT = {
    "glm4-9B": ("--post-self-attn-layernorm", "--qk-layernorm", "--num-experts"),
    "qwen3-30B-A3B": ("--add-qkv-bias", "--moe-router-pre-softmax", "--moe-shared-expert"),
    "glm4.5-106B-A12B": ("--qk-layernorm", "--moe-router-topk-scaling", "--rotary-interleaved"),
    "deepseek-r1": ("--group-query-attention", "--num-query-groups", "--rotary-percent"),
    "moonlight": ("--q-lora-rank", "--moe-router-num-groups", "--mscale", "--rotary-scaling"),
}


@functools.cache
def _megatron_parser() -> argparse.ArgumentParser:
    from slime.backends.megatron.process.stock import without_warnings

    with without_warnings():
        from megatron.training.arguments import add_megatron_arguments

        parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
        add_megatron_arguments(parser)
    return parser


def _recorded(config: dict[str, Any], **changes: Any) -> Namespace:
    """What the recorded tables make of the right flags, as `slime check` has them."""
    return Namespace(**megatron_values(megatron_flags_from_hf(config)) | changes)


@pytest.mark.parametrize("name", [*FAMILIES, *PUBLISHED])
def test_flags_are_what_megatrons_own_parser_reads(name: str) -> None:
    config = PUBLISHED.get(name) or tiny_family_config(name, vocab_size=106)
    args = _megatron_parser().parse_args(megatron_flags_from_hf(config))
    check_hf_against_flags(config, args)
    if "moe" in config["model_type"]:
        assert args.moe_aux_loss_coeff == [0.0]
        assert len(args.moe_layer_freq) == config["num_hidden_layers"]


@pytest.mark.parametrize("name", [*FAMILIES, *PUBLISHED])
def test_flags_pass_where_they_are_still_words(name: str) -> None:
    config = PUBLISHED.get(name) or tiny_family_config(name, vocab_size=106)
    check_hf_against_flags(config, _recorded(config))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_flags_are_there(name: str) -> None:
    flags = " ".join(megatron_flags_from_hf(PUBLISHED[name]))
    assert [words for words in DOCUMENTED[name] if f" {words}" not in flags] == []


@pytest.mark.parametrize("name", ABSENT)
def test_flags_the_model_does_not_have_are_not_there(name: str) -> None:
    flags = " ".join(megatron_flags_from_hf(PUBLISHED[name]))
    assert [word for word in ABSENT[name] if word in flags] == []


@pytest.mark.parametrize(
    ("model_type", "change", "flag"),
    [
        ("glm4", {"rotary_percent": 1.0}, "--rotary-percent"),
        ("glm4", {"rotary_interleaved": False}, "--rotary-interleaved"),
        ("glm4", {"add_qkv_bias": False}, "--add-qkv-bias"),
        ("qwen3", {"num_experts": 8}, "--num-experts"),
        ("qwen3", {"multi_latent_attention": True}, "--multi-latent-attention"),
        ("qwen3_moe", {"moe_router_pre_softmax": True}, "--moe-router-pre-softmax"),
        ("qwen3_moe", {"moe_ffn_hidden_size": None}, "--moe-ffn-hidden-size"),
        ("qwen3_moe", {"moe_layer_freq": 2}, "--moe-layer-freq"),
        ("qwen3_moe", {"moe_shared_expert_intermediate_size": 32}, "--moe-shared-expert-inter"),
        ("glm4_moe", {"moe_layer_freq": [1] * 4}, "--moe-layer-freq"),
        ("glm4_moe", {"moe_router_topk_scaling_factor": None}, "--moe-router-topk-scaling-factor"),
        ("glm4_moe", {"moe_router_enable_expert_bias": False}, "--moe-router-enable-expert-bias"),
        ("glm4_moe", {"moe_router_score_function": "softmax"}, "--moe-router-score-function"),
        ("deepseek_v3", {"moe_router_group_topk": None}, "--moe-router-group-topk"),
        ("deepseek_v3", {"q_lora_rank": None}, "--q-lora-rank"),
        ("deepseek_v3", {"rope_type": None}, "--rope-type"),
        ("deepseek_v3", {"rotary_scaling_factor": 40.0}, "--rotary-scaling-factor"),
        ("deepseek_v3", {"v_head_dim": 128}, "--v-head-dim"),
    ],
)
def test_wrong_flag_is_named(model_type: str, change: dict[str, Any], flag: str) -> None:
    config = tiny_family_config(model_type, vocab_size=106)
    with pytest.raises(ConfigError) as error:
        check_hf_against_flags(config, _recorded(config, **change))
    named = [line.strip().split(":")[0] for line in str(error.value).splitlines()[1:-1]]
    assert len(named) == 1
    assert named[0].startswith(flag)


def test_how_to_train_is_the_users_choice() -> None:
    config = tiny_family_config("deepseek_v3", vocab_size=106)
    changes = {
        "moe_router_load_balancing_type": ("seq_aux_loss",),
        "moe_aux_loss_coeff": (0.001,),
        "moe_router_bias_update_rate": 0.001,
        "moe_router_dtype": None,
        "moe_router_pre_softmax": False,
        "kv_channels": 128,
    }
    check_hf_against_flags(config, _recorded(config, **changes))


@pytest.mark.parametrize(
    ("model_type", "change", "match"),
    [
        ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("glm4_moe", {"n_group": 4, "topk_group": 2}, "topk_group=2"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"num_experts_per_tok": None}, "num_experts_per_tok"),
    ],
)
def test_what_megatron_does_not_have_is_refused_by_name(
    model_type: str, change: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        megatron_flags_from_hf(tiny_family_config(model_type, vocab_size=106, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"original_max_position_embeddings": 8192},
        {"original_max_position_embeddings": None},
        {"beta_fast": 16},
        {"mscale": None},
        {"attention_factor": 1.5},
        {"type": "linear"},
    ],
)
def test_yarn_that_no_flag_expresses_is_refused(change: dict[str, Any]) -> None:
    scaling = DEEPSEEK_R1["rope_scaling"] | change
    with pytest.raises(ConfigError, match="YaRN"):
        megatron_flags_from_hf(DEEPSEEK_R1 | {"rope_scaling": scaling})


def test_yarn_without_scales_has_megatrons_defaults() -> None:
    scaling = DEEPSEEK_R1["rope_scaling"] | {"mscale": 0.7, "mscale_all_dim": 0}
    flags = megatron_flags_from_hf(DEEPSEEK_R1 | {"rope_scaling": scaling})
    # transformers reads mscale only together with mscale_all_dim.
    assert flags[flags.index("--mscale") + 1] == "1.0"
    assert flags[flags.index("--mscale-all-dim") + 1] == "0.0"


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        (1, "[1]*6"),
        (2, "[1]*1+[0]*1+[1]*1+[0]*1+[1]*1+[0]*1"),
        ("2", "[1]*1+[0]*1+[1]*1+[0]*1+[1]*1+[0]*1"),
        ("[0]*2+[1]*4", "[0]*2+[1]*4"),
        ("([1]*2+[0]*1)*2", "[1]*2+[0]*1+[1]*2+[0]*1"),
        ("[0,1,1,1,1,1]", "[0]*1+[1]*5"),
        ([0, 0, 0, 1, 1, 1], "[0]*3+[1]*3"),
    ],
)
def test_every_form_of_layer_frequency_means_the_same_layers(given: object, pattern: str) -> None:
    assert effective_value({"moe_layer_freq": given, "num_layers": 6}, "moe_layer_freq") == pattern


def test_layer_pattern_counts_runs() -> None:
    assert layer_pattern((False, True, True, False)) == "[0]*1+[1]*2+[0]*1"


@pytest.mark.parametrize("words", ["0", "[0]*3+", "__import__('os')", "[1]-[0]", "[1]*[2]"])
def test_layer_frequency_that_is_no_list_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="moe-layer-freq"):
        effective_value({"moe_layer_freq": words, "num_layers": 6}, "moe_layer_freq")
