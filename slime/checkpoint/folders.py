"""Whole checkpoints from one format to another: Hugging Face's and Megatron's `torch_dist`.

Tensor by tensor, without building the model: memory is that of the largest tensors and a few GiB of
what was read last, whatever the size of the model.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slime.checkpoint.block_fp8 import (
    SCALE_SUFFIX,
    is_quantized,
    quantization_config,
    quantized,
)
from slime.checkpoint.dims import ModelDims
from slime.checkpoint.hf import (
    HfFolder,
    check_names,
    names_written,
    read_hf_config,
    write_hf_folder,
)
from slime.checkpoint.mapping import BoundEntry, Mapping, load_mapping
from slime.checkpoint.saved_names import GATE_UP_PARTS, GATE_UP_STACK, Place, saved_place
from slime.checkpoint.torch_dist import (
    SectionWriter,
    Shape,
    TorchDistFolder,
    finish_checkpoint,
    is_written,
    iterations,
    verify_section,
)
from slime.config.checkpoints import TRACKER_FILE
from slime.errors import CheckpointError

RELEASE = "release"
# What a checkpoint of training holds besides weights.
_NO_WEIGHTS = re.compile(r"optimizer|chained|rng_state|opt_param_scheduler|common_state")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
# In a checkpoint that grows: what it is converted from.
_RESUME_NAME = "resume.key"

# what is done, what there is, in words: "layer 3"
Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Ranks:
    """This process among those that convert one checkpoint together.

    Attributes:
        barrier: waits for all of them.
    """

    rank: int = 0
    size: int = 1
    barrier: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class _Piece:
    """A part of a Megatron tensor: of a stack, one expert's.

    Attributes:
        place: of the whole tensor in a checkpoint.
        whole: its shape.
        offsets, sizes: of the part.
    """

    place: Place
    whole: Shape
    offsets: Shape
    sizes: Shape

    def read(self, folder: TorchDistFolder) -> Tensor:
        place = self.place
        part = folder.tensor(place.key, place.offsets(self.offsets), place.sizes(self.sizes))
        return part.reshape(self.sizes)

    def write(self, writer: SectionWriter, tensor: Tensor) -> None:
        place = self.place
        writer.add(
            place.key,
            tensor,
            shape=place.shape(self.whole),
            offsets=place.offsets(self.offsets),
            sizes=place.sizes(self.sizes),
        )


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
            for one, pieces in _matrices(bound, dims):
                whole = one.from_hf([hf.tensor(hf_name) for hf_name in one.hf_names])
                whole = whole.float() if bound.is_buffer else whole
                for piece, tensor in zip(pieces, whole.chunk(len(pieces)), strict=True):
                    piece.write(writer, tensor)


def _matrices(bound: BoundEntry, dims: ModelDims) -> Iterator[tuple[BoundEntry, list[_Piece]]]:
    """(a matrix that disk and Megatron both have, the pieces it is saved in, one above the other)."""
    place = saved_place(bound.megatron_name, dims)
    if bound.num_experts is None:
        shape = bound.megatron_shape
        yield bound, [_Piece(place, shape, (0,) * len(shape), shape)]
        return
    has_parts = bound.megatron_name.endswith(GATE_UP_STACK)
    keys = [f"{place.key}.{part}" for part in GATE_UP_PARTS] if has_parts else [place.key]
    for number in range(bound.num_experts):
        one = bound.expert(number)
        rows, width = one.megatron_shape
        rows //= len(keys)
        pieces = [
            _Piece(
                Place(key, place.layer, place.num_layers),
                whole=(bound.num_experts, rows, width),
                offsets=(number, 0, 0),
                sizes=(1, rows, width),
            )
            for key in keys
        ]
        yield one, pieces


def torch_dist_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    origin: str | Path,
    vocab_size: int | None = None,
    overwrite: bool = False,
    adds_missing: bool = False,
    max_shard_bytes: int | None = None,
    report: Report = lambda done, total, what: None,
) -> None:
    """Write the weights of a Megatron checkpoint as a Hugging Face folder.

    What an interrupted conversion has in whole files is kept.

    Args:
        source: an iteration, or the folder that names its latest one.
        origin: a folder of the same architecture, whose config, tokenizer and templates are copied.
        vocab_size: rows of the vocabulary on disk, when it is not `origin`'s.
        adds_missing: take tensors that Megatron does not train, as those for multi-token prediction,
            from `origin`.

    Raises:
        CheckpointError: the checkpoint lacks a weight of the architecture or has others, or `target`
            is not empty.
    """
    folder = TorchDistFolder(find_iteration(source))
    config = read_hf_config(origin)
    config |= {} if vocab_size is None else {"vocab_size": vocab_size}
    stored = folder.shapes()
    mapping, dims = _model_of(config, None)
    rows = stored.get("embedding.word_embeddings.weight", (dims.vocab_size,))[0]
    dims = dims.with_padded_vocab(rows)
    bounds = list(mapping.parameters(dims))
    _check_stored(stored, bounds, dims, folder.path)
    expected = {name for bound in bounds for name in bound.hf_names}
    key = json.dumps(
        {
            "checkpoint": str(folder.path.resolve()),
            "written": (folder.path / "metadata.json").stat().st_mtime_ns,
            "config": config,
            "file_bytes": max_shard_bytes,
        }
    )
    done = names_written(target, key)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number, bound in enumerate(bounds):
            report(number, len(bounds), bound.megatron_name)
            for one, pieces in _matrices(bound, dims):
                if not done.issuperset(one.hf_names):
                    parts = zip(one.hf_names, _to_hf(one, pieces, folder), strict=True)
                    yield from ((name, part) for name, part in parts if name not in done)
        if adds_missing:
            with HfFolder(origin) as hf:
                for name in hf.names():
                    if name not in expected | done and name in mapping.redundant_hf_names(dims):
                        yield name, hf.tensor(name)
        report(len(bounds), len(bounds), "done")

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
        **options,
    )


def _to_hf(one: BoundEntry, pieces: list[_Piece], folder: TorchDistFolder) -> tuple[Tensor, ...]:
    parts = [piece.read(folder).flatten() for piece in pieces]
    return one.to_hf(torch.cat(parts).view(one.megatron_shape))


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


def find_iteration(path: str | Path) -> Path:
    """An iteration of a checkpoint: the folder itself, or the latest one that it names.

    Raises:
        CheckpointError: it is neither.
    """
    folder = Path(path)
    latest = folder / TRACKER_FILE
    if latest.is_file():
        word = latest.read_text().strip()
        return folder / (word if word == RELEASE else f"iter_{int(word):07d}")
    if (folder / "metadata.json").is_file():
        return folder
    found = [item.name for item in iterations(folder)] if folder.is_dir() else []
    hint = f"; it holds {', '.join(found)}: name one of them" if found else ""
    raise CheckpointError(
        f"{folder} is no torch_dist checkpoint: neither {TRACKER_FILE} nor metadata.json{hint}."
    )


def _check_stored(
    stored: dict[str, Shape], bounds: list[BoundEntry], dims: ModelDims, where: Path
) -> None:
    """Nothing, when the checkpoint has the tensors of the architecture, in their shapes, and no other.

    Raises:
        CheckpointError: names those that are missing, left over or of another shape.
    """
    expected = {
        piece.place.key: piece.place.shape(piece.whole)
        for bound in bounds
        for _, pieces in _matrices(bound, dims)
        for piece in pieces
    }
    weights = {key: shape for key, shape in stored.items() if not _NO_WEIGHTS.match(key)}
    check_names(weights, expected, where=where)
    wrong = [
        f"{key} {list(weights[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if weights[key] != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{where} is of another size than the config of --origin-hf-dir: {', '.join(wrong[:4])}"
        )
