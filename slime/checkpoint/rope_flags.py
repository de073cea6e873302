"""Rotary positions of a Hugging Face config in Megatron's flags."""

from collections.abc import Mapping
from typing import Any

from slime.checkpoint.settings import Setting
from slime.errors import ConfigError

# Megatron-Core 0.19.2 has these numbers in its code, with no flag for them.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN_ROPE: dict[str, Any] = {
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "truncate": True,
}
# In these transformers turns half of a head unless the file says otherwise.
_HALF_ROTARY = ("glm4", "glm4_moe")


def rope_settings(hf_config: Mapping[str, Any], *, has_mla: bool) -> list[Setting]:
    """What RoPE asks of Megatron's flags, from the old keys or transformers 5's.

    Raises:
        ConfigError: a scaling or a base that no flag expresses.
    """
    parameters = _parameters(hf_config)
    theta = parameters.get("rope_theta", hf_config.get("rope_theta", 10000))
    if theta != int(theta):
        raise ConfigError(f"config.json has rope_theta={theta}; --rotary-base takes whole numbers.")
    percent, model_type = rotary_percent(hf_config), hf_config.get("model_type")
    is_interleaved = model_type == "glm4"
    return [
        Setting("--use-rotary-position-embeddings", "use_rotary_position_embeddings", True),
        Setting("--rotary-base", "rotary_base", int(theta)),
        Setting("--rotary-percent", "rotary_percent", percent, percent != 1.0),
        Setting("--rotary-interleaved", "rotary_interleaved", is_interleaved, is_interleaved),
        *(_mla_scaling(parameters) if has_mla else _scaling(parameters)),
    ]


def rotary_percent(hf_config: Mapping[str, Any]) -> float:
    """The part of each head that RoPE turns, from 0 to 1."""
    default = 0.5 if hf_config.get("model_type") in _HALF_ROTARY else 1.0
    outer = hf_config.get("partial_rotary_factor", default)
    return float(_parameters(hf_config).get("partial_rotary_factor", outer))


def _parameters(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    return hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}


def _kind(parameters: Mapping[str, Any]) -> str:
    return parameters.get("rope_type", parameters.get("type", "default"))


def _scaling(parameters: Mapping[str, Any]) -> list[Setting]:
    """Llama 3's, of ordinary attention."""
    kind, factor = _kind(parameters), None
    if kind != "default":
        differs = any(parameters.get(key) != want for key, want in _LLAMA3_ROPE.items())
        if kind != "llama3" or differs:
            raise ConfigError(
                f"config.json scales RoPE by {dict(parameters)}; Megatron-Core has only Llama 3's "
                f"way, with {_LLAMA3_ROPE}."
            )
        factor = float(parameters["factor"])
    has_scaling = factor is not None
    return [
        Setting("--use-rope-scaling", "use_rope_scaling", has_scaling, has_scaling),
        Setting("--rope-scaling-factor", "rope_scaling_factor", factor, has_scaling),
    ]


def _mla_scaling(parameters: Mapping[str, Any]) -> list[Setting]:
    """YaRN, of multi-latent attention; it scales the softmax too."""
    kind = _kind(parameters)
    if kind == "default":
        return [
            Setting("--rope-type", "rope_type", "rope"),
            # With another factor Megatron scales the softmax, whatever the type of RoPE.
            Setting("--rotary-scaling-factor", "rotary_scaling_factor", 1.0, given=False),
        ]
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    # transformers reads the two together or not at all, except that the second alone scales the
    # softmax, for which Megatron has no flags.
    is_odd = bool(all_dim) and not mscale
    usual = _YARN_ROPE | {"original_max_position_embeddings": None}
    found = {key: _or_usual(parameters.get(key), usual[key]) for key in _YARN_ROPE}
    if kind != "yarn" or found != _YARN_ROPE or is_odd:
        raise ConfigError(
            f"config.json scales RoPE by {dict(parameters)}; Megatron-Core has only YaRN for "
            f"multi-latent attention, with {_YARN_ROPE} and mscale wherever mscale_all_dim is."
        )
    factor = float(parameters["factor"])
    scale = float(mscale) if mscale and all_dim else 1.0
    return [
        Setting("--rope-type", "rope_type", "yarn"),
        Setting("--rotary-scaling-factor", "rotary_scaling_factor", factor),
        Setting("--mscale", "mscale", scale),
        Setting("--mscale-all-dim", "mscale_all_dim", float(all_dim or 0.0)),
    ]


def _or_usual(value: Any, usual: Any) -> Any:
    return usual if value is None else value
