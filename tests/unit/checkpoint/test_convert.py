"""MODEL_ARGS from a config.json, and the check of one against the other."""

from argparse import Namespace
from typing import Any

import pytest
from support.published_configs import MODEL_SCRIPTS

from slime.checkpoint.convert import check_hf_against_flags, megatron_flags_from_hf
from slime.config.foreign import megatron_values
from slime.errors import ConfigError

QWEN3 = {name: MODEL_SCRIPTS[name] for name in ("qwen3-0.6B", "qwen3-1.7B", "qwen3-4B", "qwen3-8B")}
QWEN25_05B = QWEN3["qwen3-0.6B"] | {
    "model_type": "qwen2",
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": None,
    "intermediate_size": 4864,
}
LLAMA31_8B: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def _namespace(config: dict[str, Any], **changes: Any) -> Namespace:
    """What Megatron's parser makes of the flags; the trainer's tests use the real one."""
    given: dict[str, Any] = {
        "swiglu": True,
        "group_query_attention": True,
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "use_rotary_position_embeddings": True,
        "position_embedding_type": "learned_absolute",
        "rotary_base": 1000000,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "add_bias_linear": False,
        "add_qkv_bias": config["model_type"] == "qwen2",
        "qk_layernorm": config["model_type"] == "qwen3",
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "vocab_size": config["vocab_size"],
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }
    return Namespace(**megatron_values(()) | given | changes)


def test_qwen3_4b_has_the_documented_flags() -> None:
    flags = " ".join(megatron_flags_from_hf(QWEN3["qwen3-4B"]))
    for documented in (
        "--num-layers 36",
        "--hidden-size 2560",
        "--ffn-hidden-size 9728",
        "--num-attention-heads 32",
        "--group-query-attention",
        "--num-query-groups 8",
        "--kv-channels 128",
        "--rotary-base 1000000",
        "--norm-epsilon 1e-06",
        "--vocab-size 151936",
        "--qk-layernorm",
    ):
        assert documented in flags
    assert "--untie" not in flags
    assert "--add-qkv-bias" not in flags


def test_qwen2_has_a_bias_and_its_head_size_derived() -> None:
    flags = megatron_flags_from_hf(QWEN25_05B)
    assert "--add-qkv-bias" in flags
    assert "--qk-layernorm" not in flags
    assert flags[flags.index("--kv-channels") + 1] == "64"


def test_llama3_scales_its_rope() -> None:
    flags = megatron_flags_from_hf(LLAMA31_8B)
    assert flags[flags.index("--use-rope-scaling") :][:3] == [
        "--use-rope-scaling",
        "--rope-scaling-factor",
        "8.0",
    ]
    assert flags[flags.index("--rotary-base") + 1] == "500000"


def test_rope_parameters_of_transformers_5_read_the_same() -> None:
    config = dict(LLAMA31_8B)
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
    config["rope_parameters"] = {**scaling, "rope_theta": theta}
    assert megatron_flags_from_hf(config) == megatron_flags_from_hf(LLAMA31_8B)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"attention_bias": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_theta": 10000.5},
        {"rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 0.5}},
    ],
)
def test_what_no_flag_expresses_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change)) + r"|partial_rotary|RoPE"):
        megatron_flags_from_hf(QWEN3["qwen3-4B"] | change)


@pytest.mark.parametrize("config", [*QWEN3.values(), QWEN25_05B | {"head_dim": 64}])
def test_right_flags_pass(config: dict[str, Any]) -> None:
    check_hf_against_flags(config, _namespace(config))


def test_flags_left_to_their_defaults_pass_when_the_default_is_right() -> None:
    config = QWEN25_05B | {"head_dim": 64}
    check_hf_against_flags(config, _namespace(config, kv_channels=None, vocab_size=None))
    rope = {"use_rotary_position_embeddings": False, "position_embedding_type": "rope"}
    check_hf_against_flags(config, _namespace(config, **rope))


def test_full_attention_passes_without_query_groups() -> None:
    config = QWEN3["qwen3-4B"] | {"num_key_value_heads": 32}
    given = _namespace(config, group_query_attention=False, num_query_groups=None)
    check_hf_against_flags(config, given)
    assert "--num-query-groups" not in megatron_flags_from_hf(config)


@pytest.mark.parametrize(
    ("flag", "change", "found", "wanted"),
    [
        ("--hidden-size", {"hidden_size": 2048}, "2048", "2560"),
        ("--num-attention-heads", {"num_attention_heads": 16}, "16", "32"),
        ("--num-query-groups", {"num_query_groups": 4}, "4", "8"),
        ("--num-query-groups", {"group_query_attention": False}, "32", "8"),
        ("--num-layers", {"num_layers": 28}, "28", "36"),
        ("--ffn-hidden-size", {"ffn_hidden_size": None}, "None", "9728"),
        ("--untie-embeddings-and-output-weights", {
            "untie_embeddings_and_output_weights": True,
        }, "True", "False"),
        ("--norm-epsilon", {"layernorm_epsilon": 1e-5}, "1e-05", "1e-06"),
        ("--rotary-base", {"rotary_base": 10000}, "10000", "1000000"),
        ("--vocab-size", {"vocab_size": 151669}, "151669", "151936"),
        ("--kv-channels", {"kv_channels": None}, "80", "128"),
        ("--qk-layernorm", {"qk_layernorm": False}, "False", "True"),
        ("--disable-bias-linear", {"add_bias_linear": True}, "True", "False"),
    ],
)  # fmt: skip
def test_wrong_flag_is_named_with_both_values(
    flag: str, change: dict[str, Any], found: str, wanted: str
) -> None:
    config = QWEN3["qwen3-4B"]
    with pytest.raises(ConfigError) as error:
        check_hf_against_flags(config, _namespace(config, **change))
    assert f"{flag}: flags say {found}, config.json {wanted}" in str(error.value)


def test_all_wrong_flags_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check_hf_against_flags(QWEN3["qwen3-4B"], _namespace(QWEN3["qwen3-0.6B"]))
    named = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:-1]]
    assert named == ["--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads"]
