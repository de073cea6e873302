"""Megatron's process groups, typed: the sizes and collectives the backend needs."""

import functools
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from slime.config.config import Config
from slime.training.interface import ParallelLayout


def build_groups(config: Config) -> ParallelLayout:
    """Make the groups for the sizes of the config; this rank's place in them.

    An earlier trainer's groups in this process are used again where they fit, and dropped otherwise.
    """
    _make_groups(
        dist.group.WORLD,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
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


@functools.lru_cache(maxsize=1)
def _make_groups(world: dist.ProcessGroup, **sizes: Any) -> None:
    """Groups over `world`; nothing to do when the last call was the same.

    Each gloo group has two threads, one of which wakes 100 times a second, and Megatron makes 20
    groups that live as long as any trainer's gradient hooks: some dozens of trainers in one process
    cost it half a core.
    """
    _make_groups.cache_clear()  # what fails below must not leave the dropped groups' entry
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **sizes)


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


def gather_over_tp(local: Tensor) -> list[Tensor]:
    """The parts of all tensor-parallel ranks, in rank order; collective."""
    group = tp_group()
    if group.size() == 1:
        return [local]
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return parts
