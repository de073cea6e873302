"""Layers and models of the user's own: what --spec and --custom-model-provider-path return, checked."""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from slime.backends.megatron.layers.dense import RMSNorm
from slime.errors import ConfigError
from slime.plugins import SPEC_HOOK, accepts_keyword, check_callable, check_signature, load_function

# What the trainer uses of a model besides its parameters.
_OF_A_MODEL = ("decoder", "set_input_tensor", "sharded_state_dict")


def layers_of(
    where: str,
    path: str,
    args: argparse.Namespace,
    config: TransformerConfig,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, by the function at `path`.

    It may return the layers of the stage, or the spec of one layer that all are like.

    Args:
        where: how messages call the function.

    Raises:
        ConfigError: it is not there, takes other arguments, or returns something else.
    """
    function = load_function(path)
    check_callable(where, SPEC_HOOK, function)
    found = function(args, config, vp_stage)
    num_layers = get_num_layers_to_build(config, vp_stage)
    if isinstance(found, ModuleSpec) and inspect.isclass(found.module):
        if issubclass(found.module, TransformerBlock):
            found = found.submodules
        elif issubclass(found.module, BaseTransformerLayer):
            found = TransformerBlockSubmodules(layer_specs=[found] * num_layers, layer_norm=RMSNorm)
    if not isinstance(found, TransformerBlockSubmodules):
        raise ConfigError(
            f"{where}: returned {_described(found)}; return TransformerBlockSubmodules, as "
            "slime.backends.megatron.specs.block_spec does, or the ModuleSpec of one layer."
        )
    if len(found.layer_specs or ()) != num_layers:
        raise ConfigError(
            f"{where}: returned {len(found.layer_specs or ())} layers, but this pipeline stage has "
            f"{num_layers}; block_spec(config, vp_stage=vp_stage) gives those of the stage."
        )
    return found


def model_of(path: str, pre: bool, post: bool, vp_stage: int | None) -> torch.nn.Module:
    """The model that `fn(pre_process, post_process[, vp_stage])` at `path` builds.

    Raises:
        ConfigError: as `layers_of`.
    """
    provider: Callable[..., Any] = load_function(path)
    check_signature("custom_model_provider_path", provider, path=path)
    extra = {"vp_stage": vp_stage} if accepts_keyword(provider, "vp_stage") else {}
    model = provider(pre, post, **extra)
    where = f"--custom-model-provider-path {path}"
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"{where}: returned {_described(model)}; return a GPTModel of Megatron.")
    lacking = [name for name in _OF_A_MODEL if not hasattr(model, name)]
    if post and not hasattr(model, "output_layer"):
        lacking.append("output_layer")
    if not accepts_keyword(model.forward, "output_processor"):
        lacking.append("forward(..., output_processor=None)")
    if lacking:
        raise ConfigError(
            f"{where}: its {type(model).__name__} lacks {', '.join(lacking)}; return a GPTModel of "
            "Megatron, or a subclass."
        )
    _check_ends(where, model, pre, post)
    return model


def _check_ends(where: str, model: Any, pre: bool, post: bool) -> None:
    """Nothing, when the model has the ends that this pipeline stage has."""
    for name, wanted in (("pre_process", pre), ("post_process", post)):
        if getattr(model, name, wanted) != wanted:
            raise ConfigError(
                f"{where}: was called with {name}={wanted} and returned a model with "
                f"{name}={not wanted}; hand the argument on to GPTModel."
            )


def _described(value: Any) -> str:
    if isinstance(value, ModuleSpec):
        return f"a ModuleSpec of {getattr(value.module, '__name__', value.module)}"
    return "None" if value is None else f"{type(value).__name__} ({str(value)[:60]})"
