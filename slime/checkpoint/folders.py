"""Whole checkpoints from one format to another: Hugging Face's and Megatron's.

Tensor by tensor, without building the model: memory is that of the largest tensors and a few GiB of
what was read last, whatever the size of the model.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from slime.checkpoint.block_fp8 import (
    SCALE_SUFFIX,
    is_quantized,
    quantization_config,
    quantized,
)
from slime.checkpoint.dims import ModelDims
from slime.checkpoint.hf import HfFolder, check_names, read_hf_config
from slime.checkpoint.hf_writer import names_written, write_hf_folder
from slime.checkpoint.mapping import BoundEntry, Mapping, load_mapping
from slime.checkpoint.pieces import StoredWeights, TorchDistWeights, matrices
from slime.checkpoint.rank_weights import RankWeights
from slime.checkpoint.ranks import Ranks
from slime.checkpoint.torch_dist import (
    SectionWriter,
    finish_checkpoint,
    is_written,
    verify_section,
)
from slime.config.checkpoints import TRACKER_FILE, has_rank_files
from slime.errors import CheckpointError

RELEASE = "release"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
# In a checkpoint that grows: what it is converted from.
_RESUME_NAME = "resume.key"

CkptFormat = Literal["torch", "torch_dist"]
# what is done, what there is, in words: "layer 3"
Report = Callable[[int, int, str], None]


def hf_to_torch_dist(
    source: str | Path,
    target: str | Path,
    *,
    padded_vocab_size: int | None = None,
    ranks: Ranks | None = None,
    report: Report = lambda done, total, what: None,
) -> Path:
    """Write `target`/release, a checkpoint of the weights in a Hugging Face folder.

    What an interrupted conversion of the same files has written is kept and checked; of others, it is
    removed. Every byte is read back and compared before the checkpoint gets its name.

    Args:
        padded_vocab_size: rows of the embedding; the vocabulary's when unset. Trainers that pad to
            another multiple load it all the same.
        ranks: share the layers with other processes on one file system.

    Returns:
        The folder written.

    Raises:
        CheckpointError: `target` holds a release already, the folder is of no known architecture or
            has other tensors than it, or the disk is full.
    """
    ranks = ranks or Ranks()
    folder, done = Path(target), Path(target) / RELEASE
    if done.exists():
        raise CheckpointError(
            f"{done} is there; name another folder for --save, or remove it to convert again."
        )
    partial = folder / f"{RELEASE}.partial"
    with HfFolder(source) as hf:
        mapping, dims = _model_of(hf.config, padded_vocab_size)
        check_names(
            hf.names(),
            mapping.hf_parameters(dims),
            ignored=mapping.redundant_hf_names(dims),
            where=source,
        )
        if ranks.rank == 0:
            _keep_or_clear(partial, _source_key(Path(source), padded_vocab_size))
        ranks.barrier()
        sections = _sections(mapping, dims)
        own = list(sections)[ranks.rank :: ranks.size]
        for number, name in enumerate(own):
            report(number, len(own), name)
            if not is_written(partial, name):
                _write_section(partial, name, sections[name], hf, dims)
            verify_section(partial, name)
        report(len(own), len(own), "done")
    ranks.barrier()
    if ranks.rank == 0:
        finish_checkpoint(partial, list(sections), {"checkpoint_version": 3.0, "iteration": 0})
        (partial / _RESUME_NAME).unlink()
        partial.rename(done)
        (folder / TRACKER_FILE).write_text(RELEASE)
    ranks.barrier()
    return done


def _source_key(source: Path, padded_vocab_size: int | None) -> str:
    """Says which files are converted, and to what: another key is another checkpoint."""
    files = {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(source.glob("*.safetensors"))
    }
    return json.dumps(
        {
            "source": str(source.resolve()),
            "files": files,
            "config": read_hf_config(source),
            "padded_vocab_size": padded_vocab_size,
        }
    )


def _keep_or_clear(partial: Path, key: str) -> None:
    """Leave `partial` as it is when it was begun with this key, and else begin it anew."""
    written = partial / _RESUME_NAME
    if written.is_file() and written.read_text(encoding="utf-8") == key:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    written.write_text(key, encoding="utf-8")


def _model_of(config: dict[str, Any], padded_vocab_size: int | None) -> tuple[Mapping, ModelDims]:
    dims = ModelDims.from_hf_config(config, padded_vocab_size=padded_vocab_size)
    return load_mapping(str(config.get("model_type"))), dims


def _sections(mapping: Mapping, dims: ModelDims) -> dict[str, list[BoundEntry]]:
    """Name -> what is written together: a layer, or all that is in none."""
    sections: dict[str, list[BoundEntry]] = {}
    for bound in mapping.parameters(dims):
        found = _LAYER.match(bound.megatron_name)
        name = "top" if found is None else f"layer-{int(found[1]):04d}"
        sections.setdefault(name, []).append(bound)
    return sections


def _write_section(
    folder: Path, name: str, entries: list[BoundEntry], hf: HfFolder, dims: ModelDims
) -> None:
    with SectionWriter(folder, name) as writer:
        for bound in entries:
            for one, pieces in matrices(bound, dims):
                whole = one.from_hf([hf.tensor(hf_name) for hf_name in one.hf_names])
                whole = whole.float() if bound.is_buffer else whole
                for piece, tensor in zip(pieces, whole.chunk(len(pieces)), strict=True):
                    piece.write(writer, tensor)


def megatron_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    origin: str | Path,
    ckpt_format: CkptFormat | None = None,
    vocab_size: int | None = None,
    overwrite: bool = False,
    adds_missing: bool = False,
    max_shard_bytes: int | None = None,
    ranks: Ranks | None = None,
    report: Report = lambda done, total, what: None,
) -> None:
    """Write the weights of a Megatron checkpoint as a Hugging Face folder.

    What an interrupted conversion has in whole files is kept.

    Args:
        source: an iteration, or the folder that names its latest one.
        origin: a folder of the same architecture, whose config, tokenizer and templates are copied.
        ckpt_format: as Megatron's flag; None takes what the folder is.
        vocab_size: rows of the vocabulary on disk, when it is not `origin`'s.
        adds_missing: take tensors that Megatron does not train, as those for multi-token prediction,
            from `origin`.
        ranks: share the layers with other processes on one file system.

    Raises:
        CheckpointError: the checkpoint is of another format or lacks a weight of the architecture or
            has others, or `target` is not empty.
    """
    ranks = ranks or Ranks()
    weights = open_weights(source, ckpt_format)
    config = read_hf_config(origin)
    config |= {} if vocab_size is None else {"vocab_size": vocab_size}
    mapping, dims = _model_of(config, None)
    dims = dims.with_padded_vocab(weights.num_vocab_rows() or dims.vocab_size)
    bounds = list(mapping.parameters(dims))
    weights.check(bounds, dims)
    expected = {name for bound in bounds for name in bound.hf_names}
    key = json.dumps(
        {"checkpoint": weights.resume_key(), "config": config, "file_bytes": max_shard_bytes}
    )
    done = names_written(target, key)
    sections = list(_sections(mapping, dims).values())
    own = [bound for section in sections[ranks.rank :: ranks.size] for bound in section]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number, bound in enumerate(own):
            report(number, len(own), bound.megatron_name)
            for one, whole in weights.matrices(bound, dims):
                if not done.issuperset(one.hf_names):
                    parts = zip(one.hf_names, one.to_hf(whole()), strict=True)
                    yield from ((name, part) for name, part in parts if name not in done)
        if adds_missing and ranks.rank == 0:
            with HfFolder(origin) as hf:
                for name in hf.names():
                    if name not in expected | done and name in mapping.redundant_hf_names(dims):
                        yield name, hf.tensor(name)
        report(len(own), len(own), "done")

    options: dict[str, Any] = (
        {} if max_shard_bytes is None else {"max_shard_bytes": max_shard_bytes}
    )
    write_hf_folder(
        target,
        tensors(),
        config_from=origin,
        overwrite=overwrite,
        expected=None if adds_missing else expected,
        verifies=True,
        resume_key=key,
        ranks=ranks,
        **options,
    )


def hf_to_fp8(
    source: str | Path,
    target: str | Path,
    *,
    power_of_two: bool = False,
    overwrite: bool = False,
    report: Report = lambda done, total, what: None,
) -> None:
    """Write a Hugging Face folder with its projections in blocks of 8-bit numbers.

    Args:
        power_of_two: scales are powers of two.

    Raises:
        CheckpointError: `source` is in 8 bits already, or `target` is not empty.
    """
    config = read_hf_config(source)
    if "quantization_config" in config:
        raise CheckpointError(f"{source} is quantized already: {config['quantization_config']}.")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    with HfFolder(source) as folder:
        names = folder.names()

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for number, name in enumerate(names):
                report(number, len(names), name)
                tensor = folder.tensor(name)
                if not is_quantized(name):
                    yield name, tensor
                    continue
                small, scales = quantized(tensor, power_of_two=power_of_two)
                yield name, small
                yield f"{name}{SCALE_SUFFIX}", scales
            report(len(names), len(names), "done")

        unquantized = [name.removesuffix(".weight") for name in names if not is_quantized(name)]
        description = quantization_config(power_of_two=power_of_two)
        write_hf_folder(
            target,
            tensors(),
            config_from=source,
            overwrite=overwrite,
            verifies=True,
            config_changes={
                key: config.get(key, "bfloat16"),
                "quantization_config": description
                | {"modules_to_not_convert": sorted(unquantized)},
            },
        )


def open_weights(path: str | Path, ckpt_format: CkptFormat | None = None) -> StoredWeights:
    """The weights of an iteration of a checkpoint: the folder itself, or the latest one it names.

    Args:
        ckpt_format: what it has to be; None takes what it is.

    Raises:
        CheckpointError: it is neither, or of another format, or damaged.
    """
    folder = _find_iteration(Path(path))
    found = _format_of(folder)
    if ckpt_format not in (None, found):
        raise CheckpointError(
            f"{folder} is a checkpoint of --ckpt-format {found}, not {ckpt_format}; leave the flag "
            "out, or name another folder."
        )
    return RankWeights(folder) if found == "torch" else TorchDistWeights(folder)


def _find_iteration(folder: Path) -> Path:
    latest = folder / TRACKER_FILE
    if latest.is_file():
        word = latest.read_text(encoding="utf-8").strip()
        name = f"iter_{int(word):07d}" if word.isdecimal() else word
        if word and _format_of(folder / name) is not None:
            return folder / name
        raise CheckpointError(
            f"{latest} says {word!r}, but {folder / (name or '?')} is no checkpoint"
            f"{_hint(folder)}; is the copy complete?"
        )
    if _format_of(folder) is not None:
        return folder
    raise CheckpointError(
        f"{folder} is no Megatron checkpoint: neither {TRACKER_FILE} nor metadata.json nor "
        f"mp_rank_* is there{_hint(folder)}."
    )


def _format_of(folder: Path) -> CkptFormat | None:
    """The format of one iteration; None when it is none."""
    if (folder / "metadata.json").is_file():
        return "torch_dist"
    return "torch" if has_rank_files(folder) else None


def _hint(folder: Path) -> str:
    """The iterations that a folder holds, in words."""
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [item.name for item in inner if _format_of(item) is not None]
    return f"; it holds {', '.join(found)}: name one of them" if found else ""
