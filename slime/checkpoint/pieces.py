"""Where the matrices of a model are in a `torch_dist` checkpoint, and the weights of one."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from slime.checkpoint.dims import ModelDims
from slime.checkpoint.hf import check_names
from slime.checkpoint.mapping import BoundEntry
from slime.checkpoint.saved_names import (
    GATE_UP_PARTS,
    GATE_UP_STACK,
    Place,
    saved_place,
    stock_places,
)
from slime.checkpoint.torch_dist import SectionWriter, Shape, TorchDistFolder
from slime.errors import CheckpointError

# What a checkpoint of training holds besides weights.
_NO_WEIGHTS = re.compile(r"optimizer|chained|rng_state|opt_param_scheduler|common_state")


class StoredWeights(Protocol):
    """The weights of one iteration of a Megatron checkpoint, whatever its format and layout."""

    path: Path

    def resume_key(self) -> str:
        """Says which files these are: another key is another checkpoint."""
        ...

    def num_vocab_rows(self) -> int | None:
        """Rows of the whole embedding, padding included; None when there is none."""
        ...

    def check(self, bounds: Sequence[BoundEntry], dims: ModelDims) -> None:
        """Nothing, when the weights are these, in their shapes, and no others.

        Raises:
            CheckpointError: names those that are missing, left over or of another shape.
        """
        ...

    def matrices(
        self, bound: BoundEntry, dims: ModelDims
    ) -> Iterator[tuple[BoundEntry, Callable[[], Tensor]]]:
        """(a matrix that disk and Megatron both have, what reads it whole): of a stack, its experts."""
        ...


@dataclass(frozen=True)
class Piece:
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
        """The part, of `sizes`."""
        place = self.place
        part = folder.tensor(place.key, place.offsets(self.offsets), place.sizes(self.sizes))
        return part.reshape(self.sizes)

    def write(self, writer: SectionWriter, tensor: Tensor) -> None:
        """Write `tensor` as the part."""
        place = self.place
        writer.add(
            place.key,
            tensor,
            shape=place.shape(self.whole),
            offsets=place.offsets(self.offsets),
            sizes=place.sizes(self.sizes),
        )


def matrices(bound: BoundEntry, dims: ModelDims) -> Iterator[tuple[BoundEntry, list[Piece]]]:
    """(a matrix that disk and Megatron both have, the pieces it is saved in, one above the other)."""
    place = saved_place(bound.megatron_name, dims)
    if bound.num_experts is None:
        shape = bound.megatron_shape
        yield bound, [Piece(place, shape, (0,) * len(shape), shape)]
        return
    has_parts = bound.megatron_name.endswith(GATE_UP_STACK)
    keys = [f"{place.key}.{part}" for part in GATE_UP_PARTS] if has_parts else [place.key]
    for number in range(bound.num_experts):
        one = bound.expert(number)
        rows, width = one.megatron_shape
        rows //= len(keys)
        pieces = [
            Piece(
                Place(key, place.layer, place.num_layers),
                whole=(bound.num_experts, rows, width),
                offsets=(number, 0, 0),
                sizes=(1, rows, width),
            )
            for key in keys
        ]
        yield one, pieces


class TorchDistWeights:
    """See `StoredWeights`: of the format `torch_dist`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = TorchDistFolder(path)
        self._stored = self._folder.shapes()

    def resume_key(self) -> str:
        written = (self.path / "metadata.json").stat().st_mtime_ns
        return json.dumps({"checkpoint": str(self.path.resolve()), "written": written})

    def num_vocab_rows(self) -> int | None:
        shape = self._stored.get("embedding.word_embeddings.weight")
        return None if shape is None else shape[0]

    def check(self, bounds: Sequence[BoundEntry], dims: ModelDims) -> None:
        expected = {
            piece.place.key: piece.place.shape(piece.whole)
            for bound in bounds
            for _, pieces in self._pieces(bound, dims)
            for piece in pieces
        }
        weights = {key: shape for key, shape in self._stored.items() if not _NO_WEIGHTS.match(key)}
        check_names(weights, expected, where=self.path)
        wrong = [
            f"{key} {list(weights[key])} instead of {list(shape)}"
            for key, shape in expected.items()
            if weights[key] != shape
        ]
        if wrong:
            raise CheckpointError(
                f"{self.path} is of another size than the config of --origin-hf-dir: "
                f"{', '.join(wrong[:4])}"
            )

    def matrices(
        self, bound: BoundEntry, dims: ModelDims
    ) -> Iterator[tuple[BoundEntry, Callable[[], Tensor]]]:
        for one, pieces in self._pieces(bound, dims):
            yield one, lambda one=one, pieces=pieces: self._whole(one, pieces)

    def _pieces(
        self, bound: BoundEntry, dims: ModelDims
    ) -> Iterator[tuple[BoundEntry, list[Piece]]]:
        """As `matrices`, under the names that this checkpoint has."""
        ours = list(matrices(bound, dims))
        if ours[0][1][0].place.key in self._stored:
            yield from ours
            return
        places = stock_places(bound.megatron_name, dims)
        place = next((place for place in places if place.key in self._stored), None)
        for number, (one, pieces) in enumerate(ours):
            shape = one.megatron_shape
            if place is None:
                yield one, pieces
            elif bound.num_experts is None:
                yield one, [Piece(place, shape, (0,) * len(shape), shape)]
            else:
                whole, offsets = (bound.num_experts, *shape), (number, *(0 for _ in shape))
                yield one, [Piece(place, whole, offsets, (1, *shape))]

    def _whole(self, one: BoundEntry, pieces: list[Piece]) -> Tensor:
        parts = [piece.read(self._folder).flatten() for piece in pieces]
        return torch.cat(parts).view(one.megatron_shape)
