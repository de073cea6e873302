"""The model's parameters under Hugging Face names, and the way back: both through one mapping."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.backends.megatron.parallel import gather_over_tp, tp_group
from slime.checkpoint.hf import HfFolder, check_names, write_hf_folder
from slime.checkpoint.mapping import Mapping, ModelDims

_LOCAL_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Architecture:
    """What ties a model in memory to folders on disk."""

    mapping: Mapping
    dims: ModelDims


def global_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name with the layer's number in the whole model, parameter) of an unwrapped GPTModel."""
    layers: Any = model.get_submodule("decoder.layers")
    numbers = [layer.layer_number - 1 for layer in layers]
    for name, parameter in model.named_parameters():
        found = _LOCAL_LAYER.fullmatch(name)
        if found is not None:
            name = f"decoder.layers.{numbers[int(found[1])]}.{found[2]}"
        yield name, parameter


def named_weights(
    model: torch.nn.Module, architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of every parameter; collective over tensor-parallel ranks.

    The tensors may be views of live parameters: use or copy each before the next optimizer step.
    """
    for name, parameter in global_parameters(model):
        bound = architecture.mapping.bind(name, architecture.dims)
        whole = bound.unshard(gather_over_tp(parameter.detach()))
        if not bound.is_alias:
            yield from zip(bound.hf_names, bound.to_hf(whole), strict=True)


@torch.no_grad()
def load_hf(model: torch.nn.Module, architecture: Architecture, path: str | Path) -> None:
    """Set every parameter from a Hugging Face folder; each rank reads only what it holds.

    Raises:
        CheckpointError: the folder's tensors are not those of the architecture.
    """
    rank, size = tp_group().rank(), tp_group().size()
    mapping, dims = architecture.mapping, architecture.dims
    with HfFolder(path) as folder:
        check_names(
            folder.names(),
            mapping.hf_parameters(dims),
            ignored=mapping.redundant_hf_names(dims),
            where=path,
        )
        for name, parameter in global_parameters(model):
            bound = mapping.bind(name, dims)
            whole = bound.from_hf([folder.tensor(hf_name) for hf_name in bound.hf_names])
            parameter.copy_(bound.shard(whole, rank, size))


def save_hf(
    model: torch.nn.Module, architecture: Architecture, path: str | Path, *, config_from: str | Path
) -> None:
    """Write a Hugging Face folder from rank 0, replacing one of that name; collective."""
    weights = named_weights(model, architecture)
    if dist.get_rank() == 0:
        expected = architecture.mapping.hf_parameters(architecture.dims)
        write_hf_folder(path, weights, config_from=config_from, expected=expected, overwrite=True)
    else:
        for _ in weights:  # the gathers need every rank
            pass
    dist.barrier()
