"""The evaluation datasets of a run, every setting filled in."""

import types
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from slime.config.config import Config
from slime.config.evaluation import EvalDataset
from slime.errors import ConfigError
from slime.plugins import nearest

_KEYS = {item.name: item.type for item in fields(EvalDataset)}


def resolve_eval(config: Config) -> Config:
    """`config` with the eval settings that follow from those of training, and `eval_datasets`.

    Raises:
        ConfigError: names and paths do not pair up, or the YAML has an unknown key.
    """
    config = replace(config, **_defaults_from_rollout(config))
    if config.eval_config is not None:
        datasets = _from_yaml(config.eval_config)
    elif config.eval_prompt_data:
        datasets = _from_pairs(config.eval_prompt_data)
    else:
        datasets = list(config.eval_datasets)
    _check_names(datasets)
    filled = tuple(_prompt_len(_fill(dataset, _fallbacks(config))) for dataset in datasets)
    return replace(config, eval_datasets=filled)


def _first[T](*values: T | None) -> T | None:
    return next((value for value in values if value is not None), None)


def _defaults_from_rollout(config: Config) -> dict[str, Any]:
    return {
        "eval_input_key": _first(config.eval_input_key, config.input_key),
        "eval_label_key": _first(config.eval_label_key, config.label_key),
        "eval_tool_key": _first(config.eval_tool_key, config.tool_key),
        "eval_temperature": _first(config.eval_temperature, config.rollout_temperature),
        "eval_top_p": _first(config.eval_top_p, config.rollout_top_p),
        "eval_top_k": _first(config.eval_top_k, config.rollout_top_k),
        "eval_max_response_len": _first(
            config.eval_max_response_len, config.rollout_max_response_len
        ),
        "eval_max_context_len": _first(config.eval_max_context_len, config.rollout_max_context_len),
    }


def _fallbacks(config: Config) -> dict[str, Any]:
    """Value of each setting that a dataset leaves open."""
    return {
        "rm_type": config.rm_type,
        "input_key": config.eval_input_key,
        "label_key": config.eval_label_key,
        "tool_key": config.eval_tool_key,
        "metadata_key": config.metadata_key,
        "n_samples_per_eval_prompt": config.n_samples_per_eval_prompt,
        "temperature": config.eval_temperature,
        "top_p": config.eval_top_p,
        "top_k": config.eval_top_k,
        "max_response_len": config.eval_max_response_len,
        "max_prompt_len": config.eval_max_prompt_len,
        "max_context_len": config.eval_max_context_len,
        "min_new_tokens": config.eval_min_new_tokens,
        "stop": config.rollout_stop,
        "stop_token_ids": config.rollout_stop_token_ids,
        "skip_special_tokens": config.rollout_skip_special_tokens,
        "no_stop_trim": True,
        "apply_chat_template": config.apply_chat_template,
        "apply_chat_template_kwargs": dict(config.apply_chat_template_kwargs),
        "multimodal_keys": config.multimodal_keys,
        "custom_rm_path": config.custom_rm_path,
        "custom_generate_function_path": config.custom_generate_function_path,
    }


def _fill(dataset: EvalDataset, fallbacks: dict[str, Any]) -> EvalDataset:
    if dataset.rm_type is not None:
        # A built-in reward named for this dataset goes before the run's own function.
        fallbacks = fallbacks | {"custom_rm_path": None}
    open_settings = {
        name: value for name, value in fallbacks.items() if getattr(dataset, name) is None
    }
    return replace(dataset, **open_settings)


def _prompt_len(dataset: EvalDataset) -> EvalDataset:
    """A prompt leaves room for one token of response at least."""
    if dataset.max_prompt_len is not None or dataset.max_context_len is None:
        return dataset
    return replace(dataset, max_prompt_len=dataset.max_context_len - 1)


def _from_pairs(words: tuple[str, ...]) -> list[EvalDataset]:
    if len(words) == 1:
        return [EvalDataset(name="aime", path=words[0])]
    if len(words) % 2:
        raise ConfigError(
            f"--eval-prompt-data takes pairs `name path`, found {len(words)} words: "
            f"{' '.join(words)}"
        )
    return [
        EvalDataset(name=name, path=path)
        for name, path in zip(words[::2], words[1::2], strict=True)
    ]


def _from_yaml(path: str) -> list[EvalDataset]:
    """Datasets of `eval: {defaults: {...}, datasets: [{name, path, ...}]}`."""
    import yaml

    try:
        content: Any = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--eval-config: cannot read {path}: {error}") from error
    section = content.get("eval") if isinstance(content, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    where = f"--eval-config {path}"
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: found no `eval:` with `defaults` and `datasets` at the top")
    settings = cast(dict[str, Any], section)
    defaults = _mapping(settings.get("defaults") or {}, f"{where}: defaults")
    rows = settings.get("datasets")
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{where}: `datasets` must be a list of at least one dataset")
    return [
        _dataset(defaults | _mapping(row, f"{where}: dataset {number}"), where)
        for number, row in enumerate(cast(list[Any], rows))
    ]


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be `name: value` lines, found {value!r}")
    return cast(dict[str, Any], value)


def _dataset(row: dict[str, Any], where: str) -> EvalDataset:
    for key in row:
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, tuple(_KEYS))}")
    missing = [key for key in ("name", "path") if not row.get(key)]
    if missing:
        raise ConfigError(f"{where}: a dataset needs {' and '.join(missing)}, found {row}")
    values = {key: _typed(key, value, where) for key, value in row.items() if value is not None}
    return EvalDataset(**values)


def _typed(key: str, value: Any, where: str) -> Any:
    """`value` as the field's type; an int may stand for a float, a list for a tuple."""
    annotation: Any = _KEYS[key]
    if get_origin(annotation) is types.UnionType:
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    base: Any = get_origin(annotation) or annotation
    if base is tuple and isinstance(value, list):
        return tuple(cast(list[Any], value))
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_bool_for_number = isinstance(value, bool) and base is not bool
    if is_bool_for_number or not isinstance(value, base):
        raise ConfigError(f"{where}: {key} must be {base.__name__}, found {value!r}")
    return value


def _check_names(datasets: list[EvalDataset]) -> None:
    names = [dataset.name for dataset in datasets]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two evaluation datasets are called {name!r}; rename one")
