"""A Hugging Face config in Megatron's flags: derived from it, and held against those given.

What no flag of Megatron expresses is in the layers of the family (`slime.registry.LAYERS`).
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from slime.checkpoint.dims import MLADims, ModelDims
from slime.checkpoint.mapping import load_mapping
from slime.checkpoint.moe_flags import moe_settings
from slime.checkpoint.rope_flags import rope_settings, rotary_percent
from slime.checkpoint.settings import Setting
from slime.errors import ConfigError
from slime.registry import ARCHITECTURES

_GLM = ("glm4", "glm4_moe")

# Keys that say how layers compute, with the only value that Megatron's layers have. A key that is
# missing or null has it too.
_USUAL: dict[str, Any] = {
    "mlp_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
    # DeepSeek and GLM-4.5; transformers reads none of the first three.
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}


def megatron_flags_from_hf(hf_config: Mapping[str, Any]) -> list[str]:
    """MODEL_ARGS of the model with this `config.json`.

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
    differences = (setting.difference(vars(megatron)) for setting in _settings(hf_config))
    problems = [difference for difference in differences if difference is not None]
    if problems:
        raise ConfigError(
            "the model flags do not describe the model in --hf-checkpoint:\n  "
            + "\n  ".join(problems)
            + f"\nFor this model they are: {' '.join(megatron_flags_from_hf(hf_config))}"
        )


def count_parameters(hf_config: Mapping[str, Any]) -> int:
    """All numbers in the checkpoint of a model with this `config.json`.

    Raises:
        ConfigError, CheckpointError: another architecture, or a size is missing.
    """
    _check_supported(hf_config)
    return load_mapping(hf_config["model_type"]).count_numbers(ModelDims.from_hf_config(hf_config))


def _settings(hf_config: Mapping[str, Any]) -> list[Setting]:
    _check_supported(hf_config)
    dims = ModelDims.from_hf_config(hf_config)
    untied, qk_norm = not dims.tied, dims.qk_norm or dims.mla is not None
    return [
        Setting("--swiglu", "swiglu", True),
        Setting("--num-layers", "num_layers", dims.num_layers),
        Setting("--hidden-size", "hidden_size", dims.hidden),
        Setting("--ffn-hidden-size", "ffn_hidden_size", dims.ffn),
        *_attention_settings(dims),
        *rope_settings(hf_config, has_mla=dims.mla is not None),
        # The attribute is named for the opposite of the flag.
        Setting("--disable-bias-linear", "add_bias_linear", False),
        Setting("--add-qkv-bias", "add_qkv_bias", dims.qkv_bias, dims.qkv_bias),
        Setting("--qk-layernorm", "qk_layernorm", qk_norm, qk_norm),
        Setting("--normalization", "normalization", "RMSNorm"),
        Setting("--norm-epsilon", "layernorm_epsilon", hf_config.get("rms_norm_eps", 1e-6)),
        Setting("--vocab-size", "vocab_size", dims.vocab_size),
        Setting(
            "--untie-embeddings-and-output-weights",
            "untie_embeddings_and_output_weights",
            untied,
            untied,
        ),
        *moe_settings(hf_config, dims),
    ]


def _attention_settings(dims: ModelDims) -> list[Setting]:
    is_grouped, mla = dims.num_query_groups != dims.num_heads, dims.mla
    return [
        Setting("--num-attention-heads", "num_attention_heads", dims.num_heads),
        # One key per query head needs no flag; grouped attention with as many groups does no harm.
        Setting("--group-query-attention", "group_query_attention", is_grouped or None, is_grouped),
        Setting("--num-query-groups", "num_query_groups", dims.num_query_groups, is_grouped),
        # Multi-latent attention has sizes of its own, and does not read this one.
        Setting("--kv-channels", "kv_channels", dims.head_dim, checked=mla is None),
        *_mla_settings(mla),
    ]


def _mla_settings(mla: MLADims | None) -> list[Setting]:
    if mla is None:
        return [Setting("--multi-latent-attention", "multi_latent_attention", False, given=False)]
    rank = mla.q_lora_rank or 0
    return [
        Setting("--multi-latent-attention", "multi_latent_attention", True),
        Setting("--q-lora-rank", "q_lora_rank", rank, given=rank > 0),
        Setting("--kv-lora-rank", "kv_lora_rank", mla.kv_lora_rank),
        Setting("--qk-head-dim", "qk_head_dim", mla.qk_head_dim),
        Setting("--qk-pos-emb-head-dim", "qk_pos_emb_head_dim", mla.qk_pos_emb_head_dim),
        Setting("--v-head-dim", "v_head_dim", mla.v_head_dim),
    ]


def _check_supported(hf_config: Mapping[str, Any]) -> None:
    model_type = hf_config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"model flags cannot be derived for model_type {model_type!r}, only for "
            f"{', '.join(ARCHITECTURES)}. docs/add-a-model.md tells how to add one."
        )
    usual, found = dict(_USUAL), dict(hf_config)
    found["partial_rotary_factor"] = rotary_percent(hf_config)
    if model_type not in _GLM:
        usual |= {"attention_bias": False, "partial_rotary_factor": 1.0}
    if model_type in ("glm4_moe", "deepseek_v3"):
        usual["norm_topk_prob"] = True
    if model_type == "deepseek_v3":
        usual["num_key_value_heads"] = hf_config.get("num_attention_heads")
    for key, value in usual.items():
        if found.get(key) is not None and found[key] != value:
            raise ConfigError(
                f"config.json has {key}={found[key]!r}; for {model_type} only {value!r} is "
                "supported."
            )
