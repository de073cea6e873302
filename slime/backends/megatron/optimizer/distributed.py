"""Megatron's distributed optimizer and its schedule of learning rate and weight decay."""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from slime.backends.megatron.optimizer.host_optimizer import HostAdam, HostedOptimizer
from slime.backends.megatron.process.stock import without_warnings
from slime.config.config import Config
from slime.config.schedule import num_warmup_steps, schedule
from slime.errors import ConfigError


def build_optimizer(
    args: argparse.Namespace, model: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """The optimizer the arguments describe; Adam runs torch's fused kernel."""
    names = {field.name for field in dataclasses.fields(OptimizerConfig)}
    values = {name: value for name, value in vars(args).items() if name in names}
    values["optimizer_cpu_offload"] = False  # Megatron's way of it; see host_optimizer.py for ours
    chunks: list[Any] = list(model)
    offloads = args.optimizer_cpu_offload
    with _without_gradients(model) if offloads else contextlib.nullcontext():
        optimizer = get_megatron_optimizer(
            OptimizerConfig(**values), chunks, use_gloo_process_groups=False
        )
        if offloads:
            optimizer = _move_to_host(optimizer, args.optimizer_offload_fraction)
    for inner in torch_optimizers(optimizer):
        if isinstance(inner, torch.optim.Adam) and not isinstance(inner, HostAdam):
            for group in inner.param_groups:
                group["fused"] = True
            _create_state(inner)
    return optimizer


@contextlib.contextmanager
def _without_gradients(model: list[DistributedDataParallel]) -> Iterator[None]:
    """Gradient buffers take no memory in the block, and are zeros after it.

    Megatron makes all fp32 weights at once before they can go to the host; they fit where the
    gradients will be.
    """
    storages = [
        buffer.grad_data.untyped_storage() for chunk in model for buffer in gradient_buffers(chunk)
    ]
    sizes = [storage.nbytes() for storage in storages]
    for storage in storages:
        storage.resize_(0)
    try:
        yield
    finally:
        for storage, size in zip(storages, sizes, strict=True):
            storage.resize_(size)
        for chunk in model:
            chunk.zero_grad_buffer()


def gradient_buffers(chunk: DistributedDataParallel) -> list[Any]:
    """The buffers behind a chunk's gradients: of dense parameters and of experts."""
    wrapper: Any = chunk  # its attribute `buffers` hides the method of modules
    return [*wrapper.buffers, *wrapper.expert_parallel_buffers]


def _move_to_host(optimizer: Any, fraction: float) -> MegatronOptimizer:
    """The same optimizer with `fraction` of each part's weights and moments on the host."""
    parts = [
        part if part.is_stub_optimizer else HostedOptimizer.of(part, fraction)
        for part in megatron_optimizers(optimizer)
    ]
    if not hasattr(optimizer, "chained_optimizers"):
        return parts[0]
    optimizer.chained_optimizers = parts
    return optimizer


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside, one per kind of parameters; they hold this rank's shards."""
    inner = [part.optimizer for part in megatron_optimizers(optimizer)]
    return [part for part in inner if part is not None]


def megatron_optimizers(optimizer: Any) -> list[Any]:
    """The parts of a chain: dense and expert parameters have an optimizer each."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    # Checkpoints describe moments before the first step has made any.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def build_scheduler(
    args: argparse.Namespace, config: Config, optimizer: MegatronOptimizer
) -> OptimizerParamScheduler:
    """The schedule in rollouts: warm-up, decay and weight decay as Megatron's flags say.

    Raises:
        ConfigError: the flags contradict each other.
    """
    assert config.global_batch_size is not None
    # For a run by --num-epoch it could not be told before: its prompts had to be counted.
    for problem in schedule(config):
        raise ConfigError(problem)
    batch = config.global_batch_size
    decay_iters = args.lr_decay_iters or args.train_iters
    warmup: Any = num_warmup_steps(config, decay_iters)  # Megatron takes fractions, and says int
    wsd = args.lr_wsd_decay_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup * batch,
        lr_decay_steps=decay_iters * batch,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=args.train_iters * batch,
        wd_incr_style=args.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        wsd_decay_steps=None if wsd is None else wsd * batch,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )


@without_warnings()
def zero_gradients(model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Clear the gradient buffers, and what points into them."""
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


@without_warnings()
def guarded_step(optimizer: MegatronOptimizer, clip_grad: float) -> tuple[bool, float]:
    """(whether the weights were updated, norm of the gradient before clipping); collective.

    A gradient that is not finite updates nothing: one bad sample must not end the run, nor the
    model. The norm is taken over all ranks, so all of them decide alike.
    """
    overflow = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if overflow or not math.isfinite(norm):
        return False, norm
    # Megatron lists every gradient before it finds that nothing is to be clipped; the margin is
    # above the 1e-6 that it adds to the norm.
    if clip_grad > 0.0 and norm + 1e-5 > clip_grad:
        for part in megatron_optimizers(optimizer):
            clip_grad_by_total_norm_fp32(part.get_parameters(), clip_grad, norm)
    return bool(optimizer.step_with_ready_grads()), norm


@torch.no_grad()
def reset_moments(optimizer: MegatronOptimizer) -> None:
    """Start the moments and step counters of all parameters again from 0."""
    for inner in torch_optimizers(optimizer):
        for state in inner.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
