"""The model's shape in Megatron's flags against config.json of --hf-checkpoint."""

from typing import Any, cast

from slime.config.checkpoints import read_hf_config
from slime.config.config import Config
from slime.config.foreign import megatron_index, typed_megatron_argv
from slime.config.words import merged_values, read_words
from slime.errors import ConfigError

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


def check_against_hf(folder: str, config: Config) -> None:
    """Nothing, when the shape given in flags is that of the model in `folder`.

    Flags that are not given are not compared: the trainer then takes them from the folder.

    Raises:
        ConfigError: lists every difference.
    """
    if config.num_layers is None and not config.debug_rollout_only:
        raise ConfigError(
            "the model's flags are missing (--num-layers, --hidden-size, ...): give the MODEL_ARGS "
            "of this model, as scripts/models/*.sh have them"
        )
    theirs = read_hf_config(folder)
    words = read_words((*config.megatron_argv, *typed_megatron_argv(config)), megatron_index())
    given = merged_values(words)
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
        raise ConfigError(
            f"the model's flags and --hf-checkpoint {folder} differ: {'; '.join(differences)}; "
            "take the MODEL_ARGS of this model, or another checkpoint"
        )


def _value(hf_config: dict[str, Any], key: str) -> Any:
    if key == "rope_theta":
        # Since transformers 5 it stands inside rope_parameters.
        parameters = cast(dict[str, Any], hf_config.get("rope_parameters") or {})
        return hf_config.get(key, parameters.get(key))
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
