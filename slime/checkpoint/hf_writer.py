"""A Hugging Face folder, written as a stream of tensors."""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slime.checkpoint.hf import check_names, read_hf_config
from slime.checkpoint.hf_shards import RESUME_NAME, ShardWriter, write_json, written_shards
from slime.checkpoint.ranks import Ranks
from slime.checkpoint.safetensors_file import MakeRoom
from slime.errors import CheckpointError
from slime.observability.disk import write_failure

MAX_SHARD_BYTES = 5 * 1024**3
# What a model folder holds besides weights: config, tokenizer, templates, custom code.
_COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}


def write_hf_folder(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config_from: str | Path,
    dtype: torch.dtype | None = None,
    keep_dtype: Collection[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    expected: Iterable[str] | None = None,
    overwrite: bool = False,
    config_changes: Mapping[str, Any] | None = None,
    verifies: bool = False,
    resume_key: str | None = None,
    ranks: Ranks | None = None,
    index_metadata: Callable[[], Mapping[str, Any]] | None = None,
    make_room: MakeRoom | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM` loads, as the tensors come.

    Each tensor is written when it comes. All goes to the side folder `<path>.partial`, which gets
    its name when it is whole: a folder named `path` is never half-written.

    Args:
        tensors: (name on disk, whole tensor), each once; `lm_head.weight` is left out when the
            config ties it.
        config_from: the folder whose config, tokenizer and templates are copied.
        dtype: cast floating-point tensors to it; None keeps theirs. The written config states it.
        keep_dtype: names that are not cast: `Mapping.hf_buffers`.
        expected: names that must have come, no more and no less; None does not check.
        overwrite: replace a folder that is there.
        config_changes: keys of the written config that differ.
        verifies: read every file again and compare.
        resume_key: says what is written. An interrupted write stays as far as its files are whole, and
            one with the same key goes on there: `tensors` then leaves out `names_written`.
        ranks: processes that write one folder together, each its own `tensors` into files of its own;
            `expected` are those of all. It needs a `resume_key`.
        index_metadata: called when all tensors are written: what the index says besides. There is an
            index then also for a single file, and for no tensor at all.
        make_room: as `SafetensorsFile` has it.

    Raises:
        CheckpointError: `path` is there and not empty, a name came twice, or the names are not
            `expected`.
    """
    target = Path(path)
    if target.exists() and not overwrite and (target.is_file() or any(target.iterdir())):
        raise CheckpointError(
            f"{target} is there and not empty; name another folder, or remove it."
        )
    ranks = ranks or Ranks()
    config = read_hf_config(config_from)
    tied = bool(config.get("tie_word_embeddings", False))
    partial = _partial_of(target)
    written = written_shards(partial, resume_key)
    assert ranks.size == 1 or resume_key is not None, "the others would not find the files"
    ranks.barrier()  # all know what is there before one of them writes
    if ranks.rank == 0:
        _begin(partial, resume_key, written)
    ranks.barrier()
    shards = ShardWriter(
        partial, max_shard_bytes, written, ranks, verifies=verifies, make_room=make_room
    )
    try:
        for name, tensor in tensors:
            if not (tied and name == "lm_head.weight"):
                shards.add(name, _prepare(tensor, None if name in keep_dtype else dtype))
        shards.close()
        ranks.barrier()
        if ranks.rank == 0:
            shards.take_in(written_shards(partial, resume_key) if ranks.size > 1 else {})
            if expected is not None:
                check_names(shards.shard_of, expected, where=f"the model written to {target}")
            shards.finish(None if index_metadata is None else index_metadata())
            _copy_companions(Path(config_from), partial)
            _write_config(partial, config, shards.main_dtype(), config_changes or {})
            _put_in_place(partial, target)
        ranks.barrier()
    except BaseException as error:
        shards.abandon()
        if resume_key is None:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(write_failure(target, error)) from error
        raise


def _begin(partial: Path, resume_key: str | None, written: Collection[int]) -> None:
    """Leave the whole files in the side folder, and nothing when there are none."""
    if written:
        for path in partial.glob("shard-*.tmp"):
            if int(path.stem.removeprefix("shard-")) not in written:
                path.unlink()
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if resume_key is not None:
        (partial / RESUME_NAME).write_text(resume_key, encoding="utf-8")


def names_written(path: str | Path, resume_key: str) -> set[str]:
    """Names that an interrupted `write_hf_folder` with this key has in whole files."""
    shards = written_shards(_partial_of(Path(path)), resume_key)
    return {name for contents in shards.values() for name in contents}


def _partial_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _prepare(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the CPU and in one piece, cast if it is of floating point."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", wanted).contiguous()


def _copy_companions(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        is_companion = file.suffix in _COMPANION_SUFFIXES and not file.name.endswith(".index.json")
        if file.is_file() and (is_companion or file.name.startswith("LICENSE")):
            shutil.copyfile(file, folder / file.name)


def _write_config(
    folder: Path,
    config: dict[str, Any],
    dtype: torch.dtype | None,
    changes: Mapping[str, Any],
) -> None:
    # transformers casts to the dtype the config states, so it has to be the one in the files.
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    stated = {} if dtype is None else {key: str(dtype).removeprefix("torch.")}
    if dtype is None or dtype.itemsize > 1:  # weights in 8 bits were read as bf16
        config = {name: value for name, value in config.items() if name != "quantization_config"}
    write_json(folder / "config.json", config | stated | dict(changes))


def _put_in_place(partial: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)
