"""Start of one training rank: device, process group, Megatron's parallel groups, seeds."""

import ctypes
import os
import random
import sys
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from slime.config.config import Config
from slime.engines.rendezvous import interface_of, joined_store, listening_store, local_address
from slime.errors import ConfigError
from slime.training.interface import ParallelLayout

# M_MMAP_MAX: no mappings of their own; M_TRIM_THRESHOLD: never shrink; M_TOP_PAD: grow by 64 MiB.
_MALLOC_OPTIONS = {-4: 0, -1: 2**31 - 1, -2: 64 * 2**20}


def choose_device(config: Config, local_rank: int) -> torch.device:
    """The device of this rank, made current; a launcher may show each rank its own card alone.

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
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """Let the C library keep what torch frees, for the next step's tensors; glibc only.

    By default each large tensor is mapped anew and its pages cleared by the kernel: up to 50 of 320
    ms per step were measured for a model of 0.2 M parameters.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _MALLOC_OPTIONS.items():
            mallopt(option, value)


def join_process_group(
    config: Config,
    *,
    device: torch.device,
    rank: int,
    world_size: int,
    master_addr: str,
    master_port: int,
) -> None:
    """Join the default process group, NCCL on CUDA and gloo on CPU; keep the one that exists.

    NCCL's communicators are made at their first use: Megatron makes some twenty groups, many of
    which never speak, and with `device_id` here each would cost half a second and 0.3 GiB.
    """
    if dist.is_initialized():
        return
    # Megatron's checkpoints and Gloo groups read these.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": master_addr, "MASTER_PORT": str(master_port)}
    interface = interface_of(local_address(master_addr, master_port))
    if interface is not None and sys.platform == "linux":
        # Gloo listens at the address of the host's name: often one that others reach when the run is
        # on this machine alone, or one that other nodes do not reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if device.type == "cuda":
        # As SGLang sets it in its servers: members of one communicator must agree, and the weights
        # travel over one.
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=_store(rank, world_size, master_addr, master_port, timeout),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def _store(rank: int, world_size: int, host: str, port: int, timeout: timedelta) -> Any:
    """Where the ranks meet: rank 0 listens at `host` alone, the others connect."""
    if rank == 0:
        return listening_store(host, port, world_size, timeout)
    return joined_store(host, port, world_size, timeout)


def seed_everything(seed: int, layout: ParallelLayout) -> None:
    """Seed Python, numpy, torch and Megatron's tracker; only pipeline stages differ."""
    # The same offset per stage as Megatron's own initialize.
    seed += 100 * layout.pp_rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
