"""Megatron checkpoints (`torch_dist`): saving and loading.

A checkpoint is `{save}/iter_{rollout_id:07d}`, named in `{save}/latest_checkpointed_iteration.txt`
once it is whole.
"""

import argparse
import contextlib
import logging
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from slime.backends.megatron.optimizer.distributed import megatron_optimizers, torch_optimizers
from slime.backends.megatron.process.parallel import barrier, dp_cp_group, pp_group, tp_group
from slime.backends.megatron.state.sources import Source
from slime.config.checkpoints import TRACKER_FILE
from slime.config.config import Config
from slime.errors import CheckpointError, ConfigError
from slime.observability.disk import folder_bytes, os_error_behind, write_failure

logger = logging.getLogger(__name__)

_RNG_KEY = "rng_state"


# Tensors with a row for each token: Megatron pads them to a multiple that follows from the layout.
_VOCAB_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class TrainState:
    """All that a checkpoint holds.

    Attributes:
        model: this rank's chunks.
        vocab_size: tokens there are, without padding.
    """

    model: list[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    args: argparse.Namespace
    vocab_size: int


def save_checkpoint(
    state: TrainState, folder: str, rollout_id: int, *, with_optimizer: bool
) -> None:
    """Write `iter_{rollout_id}` and then name it as the latest; collective.

    It grows in a side folder, so a folder of its final name is always whole.

    Raises:
        CheckpointError: it could not be written, often as the disk is full; the checkpoint before
            it is still the latest, and what was written of this one is gone.
    """
    target = Path(folder) / f"iter_{rollout_id:07d}"
    try:
        _save(state, target, rollout_id, with_optimizer=with_optimizer)
    except (OSError, RuntimeError, CheckpointException) as error:
        if _write_error(error) is None:
            raise
        needed = max((folder_bytes(path) for path in target.parent.glob("iter_???????")), default=0)
        message = write_failure(target, _write_error(error) or error, needed_bytes=needed or None)
        if dist.get_rank() == 0:
            shutil.rmtree(target.with_name(f"{target.name}.partial"), ignore_errors=True)
        raise CheckpointError(
            f"{message}. The checkpoint before it is still the latest: go on from there with --load"
        ) from error


def _write_error(error: BaseException) -> OSError | None:
    """What the file system said: to this rank, or, by torch's report, to another."""
    if isinstance(error, CheckpointException):
        for failure, _ in error.failures.values():
            if (cause := os_error_behind(failure)) is not None:
                return cause
    return os_error_behind(error)


def _save(state: TrainState, target: Path, rollout_id: int, *, with_optimizer: bool) -> None:
    root, partial = target.parent, target.with_name(f"{target.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    content = _sharded_content(state, with_optimizer=with_optimizer, is_loading=False)
    content |= {"iteration": rollout_id, "checkpoint_version": 3.0, "args": _plain(state.args)}
    dist_checkpointing.save(
        content,
        str(partial),
        FullyParallelSaveStrategyWrapper(_DirectSave(), dp_cp_group()),  # pyright: ignore[reportArgumentType]
        content_metadata={k: v for k, v in _metadata().items() if k != "dp_cp_group"},
    )
    barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _write_latest(root, rollout_id)
    barrier()


def _write_latest(root: Path, rollout_id: int) -> None:
    draft = root / f"{TRACKER_FILE}.partial"
    draft.write_text(str(rollout_id))
    os.replace(draft, root / TRACKER_FILE)


def load_model_weights(model: list[torch.nn.Module], source: Source, *, vocab_size: int) -> None:
    """The weights of a Megatron checkpoint, of any parallel layout; collective.

    Args:
        vocab_size: tokens there are; rows beyond are padding, of which each layout has its number.

    Raises:
        CheckpointError: it is of another model.
    """
    weights = _sharded_weights(model)
    _allow_other_padding(weights, source, vocab_size)
    _set_weights(model, _load(weights, source))


def load_train_state(state: TrainState, source: Source, config: Config) -> None:
    """Weights, and the rest unless --no-load-optim and --no-load-rng forbid it; collective.

    The random state is loaded into as many tensor and pipeline ranks as wrote it; others keep their
    own, and a log line says so.

    Raises:
        CheckpointError: it is of another model, or was saved without optimizer state.
    """
    content = _sharded_content(
        state, with_optimizer=not config.no_load_optim, is_loading=True, source=source
    )
    if config.no_load_rng or _has_rng_of_other_ranks(source):
        del content[_RNG_KEY]
    loaded = _load(content, source)
    _set_weights(state.model, loaded)
    if not config.no_load_optim:
        _load_optimizer(state.optimizer, loaded["optimizer"])
        _load_scheduler(state.scheduler, loaded["opt_param_scheduler"])
    if _RNG_KEY in loaded:
        _set_rng_state(loaded[_RNG_KEY][0])


def _has_rng_of_other_ranks(source: Source) -> bool:
    """Whether the checkpoint's random states are of another number of ranks; the same on all ranks."""
    stored = _stored_rng_shape(source)
    now = (pp_group().size(), tp_group().size())
    if stored in (None, now):
        return False  # a checkpoint without any is refused when it is loaded
    if dist.get_rank() == 0:
        logger.info(
            "%s: its random states are of %d pipeline x %d tensor ranks and there are %d x %d now; "
            "they are not loaded, all else is",
            source.path,
            *stored,
            *now,
        )
    return True


def _stored_rng_shape(source: Source) -> tuple[int, int] | None:
    """(pipeline, tensor) size under which random states were saved; None when there is none."""
    with _readable_errors(source):
        metadata = TorchDistLoadShardedStrategy().load_sharded_metadata(source.path)
    for stored in metadata.values():
        if isinstance(stored, ShardedObject) and stored.key == _RNG_KEY:
            pipeline, tensor = stored.global_shape
            return pipeline, tensor
    return None


def _load_scheduler(scheduler: OptimizerParamScheduler, saved: dict[str, Any]) -> None:
    try:
        scheduler.load_state_dict(saved)
    except AssertionError as error:  # Megatron's word for "the two schedules differ"
        raise ConfigError(
            f"the schedule of the flags is not that of the checkpoint in --load ({error}). A longer "
            "run has another one: give --override-opt-param-scheduler to follow the flags, or "
            "--use-checkpoint-opt-param-scheduler to keep the checkpoint's."
        ) from None


def _load(content: dict[str, Any], source: Source) -> dict[str, Any]:
    strategy: Any = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), dp_cp_group())
    with _readable_errors(source):
        return dist_checkpointing.load(content, str(source.path), strategy)  # pyright: ignore[reportArgumentType, reportReturnType]


@contextlib.contextmanager
def _readable_errors(source: Source) -> Iterator[None]:
    """Megatron's and torch's errors on reading a checkpoint become CheckpointError."""
    try:
        yield
    except (CheckpointingException, CheckpointException) as error:
        raise CheckpointError(
            f"{source.path} does not fit this model: {_reason(error)}. Check MODEL_ARGS; "
            "--no-load-optim skips an optimizer state that was not saved, --no-load-rng a random "
            "state."
        ) from error
    except (OSError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise CheckpointError(
            f"{source.path} is damaged ({type(error).__name__}: {error}); resume from an earlier "
            "checkpoint with --ckpt-step, or copy it again"
        ) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # one error per rank, each with its traceback
        return str(next(iter(error.failures.values()))[0])
    return str(error)


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": dp_cp_group(),
    }


def _sharded_content(
    state: TrainState, *, with_optimizer: bool, is_loading: bool, source: Source | None = None
) -> dict[str, Any]:
    metadata = _metadata()
    weights = _sharded_weights(state.model)
    if source is not None:
        _allow_other_padding(weights, source, state.vocab_size)
    content: dict[str, Any] = {**weights, _RNG_KEY: _rng_state()}
    if with_optimizer:
        content["optimizer"] = state.optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=metadata
        )
        content["opt_param_scheduler"] = state.scheduler.state_dict()
    return content


def _chunk_keys(model: list[torch.nn.Module]) -> list[str]:
    """Where Megatron's checkpoints keep each chunk."""
    return ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]


def _sharded_weights(model: list[torch.nn.Module]) -> dict[str, Any]:
    chunks: list[Any] = list(model)
    weights = {
        key: {
            name: value
            for name, value in chunk.sharded_state_dict(metadata=_metadata()).items()
            if not _is_scaling(name)
        }
        for key, chunk in zip(_chunk_keys(model), chunks, strict=True)
    }
    for value in nested_values(weights):
        if isinstance(value, ShardedTensor):
            # Megatron would load an embedding of fewer rows and leave the others as they are.
            value.allow_shape_mismatch = False
    return weights


def _allow_other_padding(weights: dict[str, Any], source: Source, vocab_size: int) -> None:
    """Let rows beyond the vocabulary be more or fewer than stored: they are zeros then.

    A stored tensor with fewer rows than there are tokens is of another model, and stays an error.
    """
    with _readable_errors(source):
        stored = TorchDistLoadShardedStrategy().load_tensors_metadata(source.path)
    for value in nested_values(weights):
        if isinstance(value, ShardedTensor) and value.key in _VOCAB_KEYS and value.key in stored:
            rows = stored[value.key].global_shape[0]
            value.allow_shape_mismatch = min(rows, value.global_shape[0]) >= vocab_size


def _set_weights(model: list[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for key, chunk in zip(_chunk_keys(model), model, strict=True):
        missing, unexpected = chunk.load_state_dict(loaded[key], strict=False)
        if wrong := [name for name in (*missing, *unexpected) if not _is_scaling(name)]:
            raise CheckpointError(f"the checkpoint does not fit this model: {', '.join(wrong)}")


def _is_scaling(name: str) -> bool:
    """A layer's scales of 8-bit numbers, which TransformerEngine's modules have: unused, not saved."""
    return name.endswith("._extra_state")


def _load_optimizer(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> None:
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
        "rng_tracker_states": _rng_tracker().get_states(),
    }
    pp, tp = pp_group(), tp_group()
    return ShardedObject(
        _RNG_KEY,
        [state],
        (pp.size(), tp.size()),
        (pp.rank(), tp.rank()),
        replica_id=dp_cp_group().rank(),
    )


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    if state["cuda_rng_state"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng_state"])
    _rng_tracker().set_states(state["rng_tracker_states"])


def _rng_tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()


def _plain(args: argparse.Namespace) -> argparse.Namespace:
    """The values of plain types: what tools read, and what loads without running pickled code."""
    plain = (bool, int, float, str, type(None))
    return argparse.Namespace(**{k: v for k, v in vars(args).items() if isinstance(v, plain)})


class _DirectSave(TorchDistSaveShardedStrategy):
    """Megatron's format, written by torch's own writer in this process.

    The stock strategy starts a multiprocessing manager even for a synchronous save: three seconds
    instead of a third of one, and a hang where the main module does not guard what it runs.
    """

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        save_state_dict(
            mcore_to_pyt_state_dict(renamed, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=False,
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
        )
