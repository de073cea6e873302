"""Megatron checkpoints (`torch_dist`): what to start from, saving and loading.

A checkpoint is `{save}/iter_{rollout_id:07d}`, named in `{save}/latest_checkpointed_iteration.txt`
once it is whole.
"""

import argparse
import logging
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed import checkpoint as torch_checkpoint

from slime.backends.megatron.optimizer import megatron_optimizers, torch_optimizers
from slime.config.config import Config
from slime.errors import CheckpointError

logger = logging.getLogger(__name__)

LATEST_NAME = "latest_checkpointed_iteration.txt"
_RELEASE = "release"


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    Attributes:
        kind: a Hugging Face folder, or one iteration of a Megatron checkpoint.
        path: the folder that holds the tensors.
        iteration: of a Megatron checkpoint; None for a "release", which has weights only.
    """

    kind: Literal["hf", "megatron"]
    path: Path
    iteration: int | None = None


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        source: of the weights.
        resumes: optimizer, scheduler and random state come from it too, and rollouts are counted
            on.
    """

    source: Source
    resumes: bool


def find_source(path: str, step: int | None = None) -> Source | None:
    """What a folder holds; None when it is neither kind of checkpoint.

    Args:
        step: iteration to take instead of the latest.

    Raises:
        CheckpointError: a Megatron checkpoint without the iteration it names.
    """
    folder = Path(path)
    if (folder / LATEST_NAME).is_file():
        word = str(step) if step is not None else (folder / LATEST_NAME).read_text().strip()
        iteration = None if word == _RELEASE else _iteration(word, folder)
        source = folder / (_RELEASE if iteration is None else f"iter_{iteration:07d}")
        if not (source / "metadata.json").is_file():
            raise CheckpointError(
                f"{folder} should hold {source.name}, but {source} is missing or not whole; "
                f"restore it, or write the number of one that is whole into {folder / LATEST_NAME}."
            )
        return Source("megatron", source, iteration)
    if (folder / "config.json").is_file():
        return Source("hf", folder)
    return None


def _iteration(word: str, folder: Path) -> int:
    if not word.isdigit():
        raise CheckpointError(
            f"{folder / LATEST_NAME} holds {word!r}; it should be a number or {_RELEASE!r}."
        )
    return int(word)


def resolve_start(config: Config, *, load_step: int | None = None) -> Start:
    """--load if it holds a checkpoint, else --ref-load; --hf-checkpoint when neither is given.

    Raises:
        CheckpointError: a folder was given but nothing can be loaded: a run never starts from
        nothing.
    """
    if config.load is None and config.ref_load is None:
        return Start(_required(config.hf_checkpoint, "--hf-checkpoint"), resumes=False)
    if config.load is not None:
        source = find_source(config.load, load_step)
        if source is not None:
            has_state = source.kind == "megatron" and source.iteration is not None
            return Start(source, resumes=has_state and not config.finetune)
        if config.ref_load is None:
            raise CheckpointError(
                f"--load {config.load} holds neither {LATEST_NAME} nor config.json, and there is "
                "no --ref-load to start from; check the path, or leave --load out to start from "
                "--hf-checkpoint."
            )
        logger.warning(
            "--load %s holds no checkpoint; starting at rollout 0 from --ref-load %s",
            config.load,
            config.ref_load,
        )
    return Start(_required(config.ref_load, "--ref-load", config.ref_ckpt_step), resumes=False)


def reference_source(config: Config) -> Source:
    """--ref-load, else --hf-checkpoint: the weights a first start had.

    Raises:
        CheckpointError: it holds no checkpoint.
    """
    if config.ref_load is not None:
        return _required(config.ref_load, "--ref-load", config.ref_ckpt_step)
    return _required(config.hf_checkpoint, "--hf-checkpoint")


def _required(path: str | None, flag: str, step: int | None = None) -> Source:
    source = None if path is None else find_source(path, step)
    if source is None:
        raise CheckpointError(
            f"{flag} {path} is neither a Hugging Face folder (config.json) nor a Megatron "
            f"checkpoint ({LATEST_NAME}); check the path."
        )
    return source


@dataclass(frozen=True)
class TrainState:
    """All that a checkpoint holds."""

    model: torch.nn.Module
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    args: argparse.Namespace


def save_checkpoint(
    state: TrainState, folder: str, rollout_id: int, *, with_optimizer: bool
) -> None:
    """Write `iter_{rollout_id}` and then name it as the latest; collective.

    It grows in a side folder, so a folder of its final name is always whole.
    """
    root = Path(folder)
    target, partial = root / f"iter_{rollout_id:07d}", root / f"iter_{rollout_id:07d}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    content = _sharded_content(state, with_optimizer=with_optimizer, is_loading=False)
    content |= {"iteration": rollout_id, "checkpoint_version": 3.0, "args": _plain(state.args)}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist_checkpointing.save(
        content,
        str(partial),
        FullyParallelSaveStrategyWrapper(_DirectSave(), group),  # pyright: ignore[reportArgumentType]
        content_metadata={k: v for k, v in _metadata().items() if k != "dp_cp_group"},
    )
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _write_latest(root, rollout_id)
    dist.barrier()


def _write_latest(root: Path, rollout_id: int) -> None:
    draft = root / f"{LATEST_NAME}.partial"
    draft.write_text(str(rollout_id))
    os.replace(draft, root / LATEST_NAME)


def load_model_weights(model: torch.nn.Module, source: Source) -> None:
    """The weights of a Megatron checkpoint, of any parallel layout; collective.

    Raises:
        CheckpointError: it is of another model.
    """
    loaded = _load({"model": model.sharded_state_dict(metadata=_metadata())}, source)  # pyright: ignore[reportCallIssue]
    model.load_state_dict(loaded["model"], strict=True)


def load_train_state(state: TrainState, source: Source, config: Config) -> None:
    """Weights and, unless --no-load-optim and --no-load-rng say otherwise, all the rest;
    collective.

    Raises:
        CheckpointError: it is of another model, or was saved without optimizer state.
    """
    content = _sharded_content(state, with_optimizer=not config.no_load_optim, is_loading=True)
    if config.no_load_rng:
        del content["rng_state"]
    loaded = _load(content, source)
    state.model.load_state_dict(loaded["model"], strict=True)
    if not config.no_load_optim:
        _load_optimizer(state.optimizer, loaded["optimizer"])
        state.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if not config.no_load_rng:
        _set_rng_state(loaded["rng_state"][0])


def _load(content: dict[str, Any], source: Source) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)
    try:
        return dist_checkpointing.load(content, str(source.path), strategy)  # pyright: ignore[reportArgumentType, reportReturnType]
    except dist_checkpointing.core.CheckpointingException as error:
        raise CheckpointError(
            f"{source.path} does not fit this model: {error}. Check MODEL_ARGS; --no-load-optim "
            "skips an optimizer state that was not saved, --no-load-rng a random state."
        ) from error


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_content(
    state: TrainState, *, with_optimizer: bool, is_loading: bool
) -> dict[str, Any]:
    metadata = _metadata()
    model: Any = state.model
    weights = model.sharded_state_dict(metadata=metadata)
    content: dict[str, Any] = {"model": weights, "rng_state": _rng_state()}
    if with_optimizer:
        content["optimizer"] = state.optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=metadata
        )
        content["opt_param_scheduler"] = state.scheduler.state_dict()
    return content


def _load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Restore hyper-parameters, moments and main weights.

    Megatron's own order trips over the step counter of torch's Adam: it looks it up among the
    sharded tensors, where it never is, and gives all parameters one shared counter, which each of
    them would then advance. So the counter is no tensor while the moments are copied, and each
    parameter gets its own afterwards.
    """
    parts = megatron_optimizers(optimizer)
    states = [loaded] if len(parts) == 1 else [loaded[i] for i in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        moments = state.pop("param_state")
        part.load_state_dict(state)
        steps = {p: values["step"] for p, values in part.optimizer.state.items()}
        for parameter, values in part.optimizer.state.items():
            values["step"] = float(steps[parameter])
        part.load_parameter_state_from_fully_reshardable(moments)
        for parameter, values in part.optimizer.state.items():
            values["step"] = steps[parameter].clone().to(parameter.device)
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            group["fused"] = True


def _rng_state() -> ShardedObject:
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    pp, tp = (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject(
        "rng_state", [state], (pp.size(), tp.size()), (pp.rank(), tp.rank()), replica_id=replica
    )


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    if state["cuda_rng_state"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def _plain(args: argparse.Namespace) -> argparse.Namespace:
    """The values of plain types: what tools read, and what loads without running pickled code."""
    plain = (bool, int, float, str, type(None))
    return argparse.Namespace(**{k: v for k, v in vars(args).items() if isinstance(v, plain)})


class _DirectSave(TorchDistSaveShardedStrategy):
    """Megatron's format, written by torch's own writer in this process.

    The stock strategy starts a multiprocessing manager even for a synchronous save: three seconds,
    and a hang where the main module cannot be imported again, as under Ray.
    """

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(renamed, False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=False,
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
        )
