"""The model's weights under Hugging Face names, and the way back: both through one mapping."""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.backends.megatron.process.parallel import (
    barrier,
    ep_group,
    etp_group,
    gather_over,
    objects_of_all_stages,
    pp_group,
    tp_group,
)
from slime.checkpoint.hf import HfFolder, check_names
from slime.checkpoint.hf_writer import write_hf_folder
from slime.checkpoint.mapping import BoundEntry, Mapping, ModelDims
from slime.checkpoint.saved_names import FUSED_MLP_NORM, FUSED_QKV_NORM
from slime.errors import CheckpointError, ShapeMismatch

_LOCAL_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# With TransformerEngine a norm is part of the projection after it.
_FUSED_NORMS = {fused: norm for norm, fused in (FUSED_QKV_NORM | FUSED_MLP_NORM).items()}
# The one buffer that is part of a checkpoint: what balances experts without a loss.
_EXPERT_BIAS = "router.expert_bias"
# Whole experts that are gathered in one collective, on all ranks together.
_GATHERED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Architecture:
    """What ties a model in memory to folders on disk."""

    model_type: str
    mapping: Mapping
    dims: ModelDims

    @cached_property
    def parameters(self) -> dict[str, BoundEntry]:
        """All of the table by Megatron's name, without aliases, in its order.

        Made once: writing out the names of thousands of experts took half of each sync.
        """
        return {bound.megatron_name: bound for bound in self.mapping.parameters(self.dims)}


def global_weights(model: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """(name with the layer's number in the whole model, parameter or buffer) of unwrapped chunks."""
    for chunk in model:
        layers: Any = chunk.get_submodule("decoder.layers")
        numbers = [layer.layer_number - 1 for layer in layers]
        for name, weight in _weights(chunk):
            found = _LOCAL_LAYER.fullmatch(name)
            if found is not None:
                inner = _apart(found[2])
                name = f"decoder.layers.{numbers[int(found[1])]}.{inner}"
            yield name, weight


def _apart(name: str) -> str:
    """The name of a layer's weight where norms stand apart from the projections after them."""
    for fused, norm in _FUSED_NORMS.items():
        if name.startswith(fused):
            return norm + name.removeprefix(fused)
    return name


def _weights(chunk: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from chunk.named_parameters()
    yield from ((n, b) for n, b in chunk.named_buffers() if n.endswith(_EXPERT_BIAS))


def named_weights(
    model: Sequence[torch.nn.Module], architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of every weight, on every rank; collective.

    The tensors may be views of live parameters: use or copy each before the next optimizer step.

    Raises:
        CheckpointError: the model and the architecture's table have not the same weights.
    """
    local = dict(global_weights(model))
    for name in local.keys() - architecture.parameters.keys():
        # An alias, or one the table does not know, which must not be left out.
        architecture.mapping.bind(name, architecture.dims)
    kinds = objects_of_all_stages({name: weight.dtype for name, weight in local.items()})
    _check_complete(kinds, architecture)
    for name, bound in architecture.parameters.items():
        stage = next(number for number, names in enumerate(kinds) if name in names)
        source = _Source(stage, kinds[stage][name])
        weight = local[name].detach() if name in local else None
        yield from (
            _stack(bound, weight, source) if bound.num_experts else _whole(bound, weight, source)
        )


def _check_complete(names_of_stages: Sequence[Collection[str]], architecture: Architecture) -> None:
    """Nothing, when every weight of the architecture's table is on some pipeline stage.

    Raises:
        CheckpointError: names those that are on none.
    """
    held = set().union(*names_of_stages)
    missing = [name for name in architecture.parameters if name not in held]
    if missing:
        raise CheckpointError(
            f"no pipeline stage of the model has {', '.join(missing[:8])}"
            f"{', ...' if len(missing) > 8 else ''}, {len(missing)} of the weights that the "
            "architecture of --hf-checkpoint has. Is it built by --spec or "
            "--custom-model-provider-path? Then give it all of them."
        )


@dataclass(frozen=True)
class _Source:
    """The pipeline stage that has a weight, and its dtype there."""

    stage: int
    dtype: torch.dtype

    def to_all_stages(self, tensor: Tensor | None, shape: Sequence[int]) -> Tensor:
        """`tensor` of this stage on every stage."""
        group = pp_group()
        if group.size() == 1:
            assert tensor is not None, "a single stage has every weight"
            return tensor
        if group.rank() != self.stage or tensor is None:
            device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
            tensor = torch.empty(*shape, dtype=self.dtype, device=device)
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group_src=self.stage, group=group)
        return tensor


def _whole(
    bound: BoundEntry, weight: Tensor | None, source: _Source
) -> Iterator[tuple[str, Tensor]]:
    whole = None
    if weight is not None and pp_group().rank() == source.stage:
        whole = bound.unshard(gather_over(tp_group(), weight))
    whole = source.to_all_stages(whole, bound.megatron_shape)
    yield from zip(bound.hf_names, bound.to_hf(whole), strict=True)


def _stack(
    bound: BoundEntry, stack: Tensor | None, source: _Source
) -> Iterator[tuple[str, Tensor]]:
    """As many experts of each expert-parallel rank at a time as `_GATHERED_BYTES` hold."""
    assert bound.num_experts is not None
    shape = bound.expert(0).megatron_shape
    num_ranks = ep_group().size()
    num_local = bound.num_experts // num_ranks
    size = num_ranks * math.prod(shape) * source.dtype.itemsize
    step = max(1, _GATHERED_BYTES // size)
    for start in range(0, num_local, step):
        count = min(step, num_local - start)
        lumps: list[Tensor | None] = [None] * num_ranks
        if stack is not None:
            own = bound.unshard_experts(gather_over(etp_group(), stack[start : start + count]))
            lumps = [*gather_over(ep_group(), own)]
        for rank, lump in enumerate(lumps):
            experts = source.to_all_stages(lump, (count, *shape))
            yield from bound.experts_to_hf(rank * num_local + start, experts)


@torch.no_grad()
def load_hf(
    model: Sequence[torch.nn.Module],
    architecture: Architecture,
    path: str | Path,
    *,
    besides: Collection[str] = (),
) -> None:
    """Set every weight from a Hugging Face folder; each rank reads only what it holds. Collective.

    Args:
        besides: names of weights that no such folder has; they stay as they are.

    Raises:
        CheckpointError: the folder's tensors, or the model's weights, are not those of the
            architecture.
    """
    mapping, dims = architecture.mapping, architecture.dims
    names = [name for name, _ in global_weights(model)]
    _check_complete(objects_of_all_stages(names), architecture)
    with HfFolder(path) as folder:
        check_names(
            folder.names(),
            mapping.hf_parameters(dims),
            ignored=mapping.redundant_hf_names(dims),
            where=path,
        )
        for name, weight in global_weights(model):
            if name in besides:
                continue
            bound = mapping.bind(name, dims)
            if not bound.num_experts:
                _set(weight, folder, bound, tp_group())
                continue
            first = ep_group().rank() * len(weight)
            for i, expert in enumerate(weight):
                _set(expert, folder, bound.expert(first + i), etp_group())


def _set(weight: Tensor, folder: HfFolder, bound: BoundEntry, group: dist.ProcessGroup) -> None:
    """Fill this rank's part of a weight.

    Raises:
        ShapeMismatch: the model's weight and the part by the table differ in shape.
    """
    whole = bound.from_hf([folder.tensor(name) for name in bound.hf_names])
    part = bound.shard(whole, group.rank(), group.size())
    if part.shape != weight.shape:  # copy_ would repeat some
        raise ShapeMismatch(
            f"{bound.megatron_name} is {list(weight.shape)} in the model, but {list(part.shape)} by "
            f"the table of its architecture ({list(whole.shape)} over {group.size()} ranks, "
            f"{bound.sharding}): the layer or the table's row is wrong."
        )
    weight.copy_(part)


def save_hf(
    model: Sequence[torch.nn.Module],
    architecture: Architecture,
    path: str | Path,
    *,
    config_from: str | Path,
) -> None:
    """Write a Hugging Face folder from rank 0, replacing one of that name; collective."""
    weights = named_weights(model, architecture)
    if dist.get_rank() == 0:
        expected = architecture.mapping.hf_parameters(architecture.dims)
        write_hf_folder(path, weights, config_from=config_from, expected=expected, overwrite=True)
    else:
        for _ in weights:  # the gathers need every rank
            pass
    barrier()
