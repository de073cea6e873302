"""The model's shape in Megatron's flags against config.json of --hf-checkpoint."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, cast

from slime.config.checkpoints import read_hf_config
from slime.config.config import Config
from slime.config.foreign import megatron_index
from slime.config.megatron import MegatronConfig
from slime.config.words import merged_values, read_words

# Megatron's flag -> key of config.json.
_KEYS = {
    "--num-layers": "num_hidden_layers",
    "--hidden-size": "hidden_size",
    "--num-attention-heads": "num_attention_heads",
    "--num-query-groups": "num_key_value_heads",
    "--kv-channels": "head_dim",
    "--ffn-hidden-size": "intermediate_size",
    "--moe-ffn-hidden-size": "moe_intermediate_size",
    "--moe-shared-expert-intermediate-size": "shared_expert_intermediate_size",
    "--norm-epsilon": "rms_norm_eps",
    "--rotary-base": "rope_theta",
}
_UNTIE = "--untie-embeddings-and-output-weights"


def check_against_hf(folder: str, config: Config) -> Iterator[str]:
    """What is wrong with the shape given in flags, when that of the model in `folder` is right.

    Flags that are not given are not compared: the trainer then takes them from the folder.

    Raises:
        ConfigError: the folder's config.json cannot be read.
    """
    if config.num_layers is None and not config.debug_rollout_only:
        yield (
            "the model's flags are missing (--num-layers, --hidden-size, ...): give the MODEL_ARGS "
            "of this model, as scripts/models/*.sh have them"
        )
    theirs = read_hf_config(folder)
    given = _given(config)
    differences: list[str] = []
    for flag, key in _KEYS.items():
        option = megatron_index().find(flag)
        expected = _value(theirs, key)
        if option is None or option.dest not in given or expected is None:
            continue
        if given[option.dest] != expected:
            differences.append(f"{flag} {given[option.dest]} (config.json: {key} {expected})")
    differences.extend(_untie_difference(theirs, given))
    if differences:
        yield (
            f"the model's flags and --hf-checkpoint {folder} differ: {'; '.join(differences)}; "
            "take the MODEL_ARGS of this model, or another checkpoint"
        )


def _given(config: Config) -> dict[str, Any]:
    """dest -> value of the flags that say something about the model, typed or not."""
    typed = {item.name for item in fields(MegatronConfig)}
    # Of the typed ones no other is asked for: one that is wrong need not keep us from comparing.
    names = [flag.removeprefix("--").replace("-", "_") for flag in _KEYS]
    values = {name: getattr(config, name) for name in names if name in typed}
    given = merged_values(read_words(config.megatron_argv, megatron_index()))
    return given | {name: value for name, value in values.items() if value is not None}


def _value(hf_config: dict[str, Any], key: str) -> Any:
    if key == "rope_theta":
        # Since transformers 5 it stands inside rope_parameters.
        parameters = cast(dict[str, Any], hf_config.get("rope_parameters") or {})
        return hf_config.get(key, parameters.get(key))
    if key == "head_dim" and hf_config.get("kv_lora_rank"):
        return None  # of multi-latent attention transformers writes the part with RoPE
    return hf_config.get(key)


def _untie_difference(hf_config: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Compared only when flags describe a model: leaving --untie out says something too."""
    is_tied = hf_config.get("tie_word_embeddings")
    if is_tied is None or "num_layers" not in given:
        return []
    is_untied = bool(given.get("untie_embeddings_and_output_weights", False))
    if is_untied != is_tied:
        return []
    found = "given" if is_untied else "not given"
    return [f"{_UNTIE} {found} (config.json: tie_word_embeddings {is_tied})"]
