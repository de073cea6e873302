"""Megatron's process groups, typed: the sizes and collectives the backend needs."""

import argparse
import functools
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from slime.training.interface import ParallelLayout


def build_groups(args: argparse.Namespace) -> ParallelLayout:
    """Make the groups for the sizes in Megatron's arguments; this rank's place in them.

    An earlier trainer's groups in this process are used again where they fit, and dropped otherwise.
    """
    _make_groups(
        dist.group.WORLD,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    return ParallelLayout(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
    )


# Megatron's groups of the last layout in this process.
_made: list[dist.ProcessGroup] = []


@functools.lru_cache(maxsize=1)
def _make_groups(world: dist.ProcessGroup, **sizes: Any) -> None:
    """Groups over `world`; nothing to do when the last call was the same.

    Each gloo group has two threads, one of which wakes 100 times a second, and Megatron makes 20
    groups: those of an earlier layout are ended, or some dozens of layouts in one process would
    cost it half a core.
    """
    _make_groups.cache_clear()  # what fails below must not leave the dropped groups' entry
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    known = _all_groups()
    while _made:
        # In the same order on all ranks: NCCL's communicators end together.
        group = _made.pop()
        if group in known:  # else the default group was destroyed, and all others with it
            dist.destroy_process_group(group)
    before = _all_groups()
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **sizes)
    _made.extend(group for group in _all_groups() if group not in before)


def _all_groups() -> list[dist.ProcessGroup]:
    """Those of this process, in the order in which they were made."""
    registry: Any = dist.distributed_c10d
    return list(registry._world.pg_map)


def barrier() -> None:
    """Wait for all ranks."""
    is_nccl = dist.get_backend() == dist.Backend.NCCL
    dist.barrier(device_ids=[torch.cuda.current_device()] if is_nccl else None)


def dp_group() -> dist.ProcessGroup:
    """Ranks with other samples and the same part of the model."""
    return cast(dist.ProcessGroup, parallel_state.get_data_parallel_group())


def dp_cp_group() -> dist.ProcessGroup:
    """Ranks with other samples or other tokens of the same samples: gradients are summed here."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return cast(dist.ProcessGroup, group)


def tp_group() -> dist.ProcessGroup:
    """Ranks that share each matrix."""
    return cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def pp_group() -> dist.ProcessGroup:
    """Ranks that share the layers."""
    return cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def cp_group() -> dist.ProcessGroup:
    """Ranks that share each sequence."""
    return cast(dist.ProcessGroup, parallel_state.get_context_parallel_group())


def ep_group() -> dist.ProcessGroup:
    """Ranks that share the experts of a layer."""
    return cast(dist.ProcessGroup, parallel_state.get_expert_model_parallel_group())


def etp_group() -> dist.ProcessGroup:
    """Ranks that share each matrix of an expert."""
    return cast(dist.ProcessGroup, parallel_state.get_expert_tensor_parallel_group())


def is_last_stage() -> bool:
    """Whether this rank has the output layer."""
    return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))


def gather_over(group: dist.ProcessGroup, local: Tensor) -> list[Tensor]:
    """The tensors of all ranks of `group`, in rank order and one after the other in memory; collective."""
    if group.size() == 1:
        return [local]
    parts = local.new_empty(group.size(), *local.shape)
    # Flat: gloo and NCCL want the parts in different shapes.
    dist.all_gather_into_tensor(parts.view(-1), local.contiguous().view(-1), group=group)
    return list(parts.unbind())


def from_last_stage(tensor: Tensor) -> Tensor:
    """`tensor` of the last pipeline stage on every stage, in place; collective."""
    group = pp_group()
    if group.size() > 1:
        dist.broadcast(tensor, group_src=group.size() - 1, group=group)
    return tensor


def object_from_last_stage(value: Any) -> Any:
    """A small object of the last pipeline stage on every stage; collective."""
    group = pp_group()
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group_src=group.size() - 1, group=group)
    return box[0]


def objects_of_all_stages(value: Any) -> list[Any]:
    """A small object of each pipeline stage, first to last; collective."""
    group = pp_group()
    values: list[Any] = [value]
    if group.size() > 1:
        values = [None] * group.size()
        dist.all_gather_object(values, value, group=group)
    return values


def ready_weight(module: torch.nn.Module) -> torch.nn.Parameter:
    """`module.weight`, for a reader that does not call the module.

    With --overlap-param-gather Megatron waits for a module's new weights in a hook before its
    forward pass. Without that hook its values may be those of the last step.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    return cast(torch.nn.Parameter, module.weight)
