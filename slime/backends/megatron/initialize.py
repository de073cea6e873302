"""Start of one training rank: device, process group, Megatron's parallel groups, seeds."""

import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from slime.config.config import Config
from slime.errors import ConfigError
from slime.training.interface import ParallelLayout


def choose_device(config: Config, local_rank: int) -> torch.device:
    """The device of this rank, made current.

    Raises:
        ConfigError: --device cuda without CUDA, or --device cpu in a process where Megatron has
        found CUDA.
    """
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError(
            "--device cuda, but torch finds no GPU; use --device cpu or check the driver."
        )
    if config.device == "cpu" and has_cuda:
        raise ConfigError(
            "--device cpu on a machine with a GPU: hide it from the trainer, with "
            "CUDA_VISIBLE_DEVICES= in its environment before it starts."
        )
    if not has_cuda:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def join_process_group(
    config: Config,
    *,
    device: torch.device,
    rank: int,
    world_size: int,
    master_addr: str,
    master_port: int,
) -> None:
    """Join the default process group, NCCL on CUDA and gloo on CPU; keep the one that exists."""
    if dist.is_initialized():
        return
    # Megatron's checkpoints and Gloo groups read these.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": master_addr, "MASTER_PORT": str(master_port)}
    host = f"[{master_addr}]" if ":" in master_addr else master_addr
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{host}:{master_port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=config.distributed_timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )


def build_parallel_groups(config: Config) -> ParallelLayout:
    """Megatron's groups for the sizes of the config, and this rank's place in them.

    Groups of an earlier trainer in this process are dropped.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
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


def seed_everything(seed: int, layout: ParallelLayout) -> None:
    """Seed Python, numpy, torch and Megatron's tracker; only pipeline stages differ."""
    # The same offset per stage as Megatron's own initialize.
    seed += 100 * layout.pp_rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
