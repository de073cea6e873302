"""A Hugging Face config in Megatron's flags: derived from it, and held against those given."""

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime.checkpoint.dims import ModelDims
from slime.errors import ConfigError

_QKV_BIAS = {"qwen2"}
_QK_NORM = {"qwen3"}
_SUPPORTED = ("llama", "qwen2", "qwen3")

# Megatron-Core 0.19.2 has these numbers of Llama 3 in its code, with no flag for them.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_Value = int | float | bool | str | None


@dataclass(frozen=True)
class _Setting:
    """What a config asks of one flag of Megatron.

    Attributes:
        attribute: where Megatron's parser puts it.
        value: what has to stand there; None means that nothing has to.
        given: whether MODEL_ARGS need the flag; a switch that stays off does not appear.
    """

    flag: str
    attribute: str
    value: _Value
    given: bool = True

    def words(self) -> list[str]:
        """The flag as it is typed, with its argument unless it is a switch."""
        if not self.given:
            return []
        return [self.flag] if isinstance(self.value, bool) else [self.flag, str(self.value)]


def megatron_flags_from_hf(hf_config: Mapping[str, Any]) -> list[str]:
    """MODEL_ARGS of a dense Llama, Qwen2 or Qwen3 with this `config.json`.

    Raises:
        ConfigError: another architecture, or something in the config that no flag expresses.
        CheckpointError: the config lacks a size.
    """
    return [word for setting in _settings(hf_config) for word in setting.words()]


def check_hf_against_flags(hf_config: Mapping[str, Any], megatron: Namespace) -> None:
    """Nothing, when Megatron's arguments describe the model of this `config.json`.

    Args:
        megatron: from Megatron's own parser, before or after its validation.

    Raises:
        ConfigError: every flag that differs, with both values; or as `megatron_flags_from_hf`.
    """
    problems: list[str] = []
    for setting in _settings(hf_config):
        found = _effective(megatron, setting.attribute)
        # A vocabulary that no flag gives is the config's.
        is_open = setting.value is None or (setting.attribute == "vocab_size" and found is None)
        if not is_open and not _agree(found, setting.value):
            problems.append(f"{setting.flag}: flags say {found}, config.json {setting.value}")
    if problems:
        raise ConfigError(
            "the model flags do not describe the model in --hf-checkpoint:\n  "
            + "\n  ".join(problems)
            + f"\nFor this model they are: {' '.join(megatron_flags_from_hf(hf_config))}"
        )


def _settings(hf_config: Mapping[str, Any]) -> list[_Setting]:
    _check_supported(hf_config)
    model_type, dims = hf_config["model_type"], ModelDims.from_hf_config(hf_config)
    rope_theta, rope_factor = _rope(hf_config)
    has_qkv_bias, has_qk_norm = model_type in _QKV_BIAS, model_type in _QK_NORM
    has_scaling = rope_factor is not None
    untied, is_grouped = not dims.tied, dims.num_query_groups != dims.num_heads
    return [
        _Setting("--swiglu", "swiglu", True),
        _Setting("--num-layers", "num_layers", dims.num_layers),
        _Setting("--hidden-size", "hidden_size", dims.hidden),
        _Setting("--ffn-hidden-size", "ffn_hidden_size", dims.ffn),
        _Setting("--num-attention-heads", "num_attention_heads", dims.num_heads),
        # One key per query head needs no flag; grouped attention with as many groups does no harm.
        _Setting(
            "--group-query-attention", "group_query_attention", is_grouped or None, is_grouped
        ),
        _Setting("--num-query-groups", "num_query_groups", dims.num_query_groups, is_grouped),
        _Setting("--kv-channels", "kv_channels", dims.head_dim),
        _Setting("--use-rotary-position-embeddings", "use_rotary_position_embeddings", True),
        _Setting("--rotary-base", "rotary_base", rope_theta),
        _Setting("--use-rope-scaling", "use_rope_scaling", has_scaling, has_scaling),
        _Setting("--rope-scaling-factor", "rope_scaling_factor", rope_factor, has_scaling),
        # The attribute is named for the opposite of the flag.
        _Setting("--disable-bias-linear", "add_bias_linear", False),
        _Setting("--add-qkv-bias", "add_qkv_bias", has_qkv_bias, has_qkv_bias),
        _Setting("--qk-layernorm", "qk_layernorm", has_qk_norm, has_qk_norm),
        _Setting("--normalization", "normalization", "RMSNorm"),
        _Setting("--norm-epsilon", "layernorm_epsilon", hf_config.get("rms_norm_eps", 1e-6)),
        _Setting("--vocab-size", "vocab_size", dims.vocab_size),
        _Setting(
            "--untie-embeddings-and-output-weights",
            "untie_embeddings_and_output_weights",
            untied,
            untied,
        ),
    ]


def _check_supported(hf_config: Mapping[str, Any]) -> None:
    model_type = hf_config.get("model_type")
    if model_type not in _SUPPORTED:
        raise ConfigError(
            f"model flags cannot be derived for model_type {model_type!r}, only for "
            f"{', '.join(_SUPPORTED)}."
        )
    supported = {
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "partial_rotary_factor": 1.0,
    }
    rope: Mapping[str, Any] = hf_config.get("rope_parameters") or {}
    everything: dict[str, Any] = {**hf_config, **rope}
    for key, usual in supported.items():
        found = everything.get(key)
        if found is not None and found != usual:
            raise ConfigError(
                f"config.json has {key}={found!r}; for {model_type} only {usual!r} is supported."
            )


def _rope(hf_config: Mapping[str, Any]) -> tuple[int, float | None]:
    """Base and, for Llama 3's scaling, its factor; from the old keys or transformers 5's."""
    scaling: Mapping[str, Any] = (
        hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    )
    theta = scaling.get("rope_theta", hf_config.get("rope_theta", 10000))
    if theta != int(theta):
        raise ConfigError(f"config.json has rope_theta={theta}; --rotary-base takes whole numbers.")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return int(theta), None
    if kind != "llama3" or any(scaling.get(key) != want for key, want in _LLAMA3_ROPE.items()):
        raise ConfigError(
            f"config.json scales RoPE by {dict(scaling)}; Megatron-Core has only Llama 3's way, "
            f"with {_LLAMA3_ROPE}."
        )
    return int(theta), float(scaling["factor"])


def _effective(megatron: Namespace, attribute: str) -> _Value:
    """The attribute as Megatron will use it: its validation fills some in from others."""
    given: dict[str, Any] = vars(megatron)
    if attribute == "num_query_groups" and not given["group_query_attention"]:
        return given["num_attention_heads"]
    if attribute == "kv_channels" and given["kv_channels"] is None:
        return given["hidden_size"] // given["num_attention_heads"]
    if attribute == "use_rotary_position_embeddings":
        return given[attribute] or given["position_embedding_type"] == "rope"
    return given[attribute]


def _agree(found: _Value, expected: _Value) -> bool:
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(found, expected, rel_tol=1e-6)
    return found == expected
