"""Experts and their router, of a Hugging Face config, in Megatron's flags."""

from collections.abc import Mapping
from typing import Any

from slime.checkpoint.dims import ModelDims, MoEDims
from slime.checkpoint.settings import Setting, Value, layer_pattern
from slime.errors import ConfigError

# Families whose router takes sigmoids, chooses with a bias and scales what it chose.
_SIGMOID = ("glm4_moe", "deepseek_v3")


def moe_settings(hf_config: Mapping[str, Any], dims: ModelDims) -> list[Setting]:
    """What the experts ask of Megatron's flags; of a dense model, that there are none.

    Raises:
        ConfigError: a router that Megatron does not have.
    """
    if dims.moe is None:
        return [Setting("--num-experts", "num_experts", 0, given=False)]
    is_sigmoid = hf_config.get("model_type") in _SIGMOID
    router = _sigmoid_router(hf_config) if is_sigmoid else _softmax_router(hf_config)
    return [
        *_sizes(dims.moe),
        _setting("router-topk", _number(hf_config, "num_experts_per_tok")),
        *router,
        # How to train: users may choose otherwise. The router's own products are in fp32 in
        # transformers' GLM and DeepSeek; for Qwen3 it keeps trainer and engine closer.
        _setting("router-dtype", "fp32", checked=False),
        _setting("router-load-balancing-type", "none", checked=False),
        _setting("aux-loss-coeff", 0.0, checked=False),
    ]


def _sizes(moe: MoEDims) -> list[Setting]:
    shared = "shared-expert-intermediate-size"
    return [
        Setting("--num-experts", "num_experts", moe.num_experts),
        _setting("layer-freq", layer_pattern(moe.layers)),
        _setting("ffn-hidden-size", moe.ffn),
        _setting(shared, moe.shared_ffn, given=moe.shared_ffn > 0),
    ]


def _softmax_router(hf_config: Mapping[str, Any]) -> list[Setting]:
    """Softmax over all experts; normalising what was chosen is a softmax over the chosen."""
    is_before = not hf_config.get("norm_topk_prob", False)
    return [
        _setting("router-score-function", "softmax"),
        _setting("router-pre-softmax", is_before, given=is_before),
        _setting("router-enable-expert-bias", False, given=False),
        _setting("router-topk-scaling-factor", 1.0, given=False),
        _setting("router-num-groups", 0, given=False),
        _setting("router-group-topk", 0, given=False),
    ]


def _sigmoid_router(hf_config: Mapping[str, Any]) -> list[Setting]:
    scale = float(hf_config.get("routed_scaling_factor") or 1.0)
    num_groups, group_topk = _groups(hf_config)
    has_groups = num_groups > 0
    return [
        _setting("router-score-function", "sigmoid"),
        # Says nothing with sigmoids; the usual MODEL_ARGS have it.
        _setting("router-pre-softmax", True, checked=False),
        _setting("router-enable-expert-bias", True),
        # The bias of the checkpoint stays: engines would not follow it within a round.
        _setting("router-bias-update-rate", 0.0, checked=False),
        _setting("router-topk-scaling-factor", scale, given=scale != 1.0),
        _setting("router-num-groups", num_groups, given=has_groups),
        _setting("router-group-topk", group_topk, given=has_groups),
    ]


def _groups(hf_config: Mapping[str, Any]) -> tuple[int, int]:
    """Groups of experts and how many of them a token may use; (0, 0) when it may use all."""
    num_groups, group_topk = hf_config.get("n_group") or 1, hf_config.get("topk_group") or 1
    if group_topk >= num_groups:
        return 0, 0
    topk = _number(hf_config, "num_experts_per_tok")
    # transformers judges a group by its two best experts, Megatron by its topk / group_topk best.
    if topk != 2 * group_topk:
        raise ConfigError(
            f"config.json has num_experts_per_tok={topk} and topk_group={group_topk}; Megatron-Core "
            "chooses groups of experts in the same way only when the first is twice the second."
        )
    return num_groups, group_topk


def _number(hf_config: Mapping[str, Any], key: str) -> int:
    value = hf_config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ConfigError(f"config.json needs a positive number as {key}; it has {value!r}.")
    return value


def _setting(name: str, value: Value, *, given: bool = True, checked: bool = True) -> Setting:
    return Setting(f"--moe-{name}", f"moe_{name.replace('-', '_')}", value, given, checked)
