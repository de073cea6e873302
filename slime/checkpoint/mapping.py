"""Mapping: one table per architecture, from Megatron's parameters to Hugging Face's and back.

The same table serves load, save, weight sync and tools. The vocabulary of its rows is in `entries`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from slime.checkpoint.dims import ModelDims
from slime.checkpoint.entries import (
    Entry,
    ExpertStack,
    FusedQKV,
    GateUp,
    Rename,
    Shape,
    TiedOr,
    expert_stack,
)
from slime.checkpoint.sharding import Sharding
from slime.errors import ShapeMismatch, UnknownParameter
from slime.registry import ARCHITECTURES, lookup

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BoundEntry",
    "Entry",
    "ExpertStack",
    "FusedQKV",
    "GateUp",
    "Mapping",
    "ModelDims",
    "Rename",
    "TiedOr",
    "expert_stack",
    "load_mapping",
]

_MEGATRON_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class BoundEntry:
    """One parameter of one model: a row of the table with its layer and sizes filled in.

    Attributes:
        megatron_name: global name, i.e. with the layer's number in the whole model.
        hf_names: names on disk; of a stack of experts, those of all experts.
        is_alias: a second copy of a tied tensor: fill it from `hf_names`, but do not write it,
            because the first copy is written under that name.
    """

    entry: Entry
    dims: ModelDims
    megatron_name: str
    hf_names: tuple[str, ...]
    is_alias: bool = False

    @property
    def megatron_shape(self) -> Shape:
        """Shape of the whole Megatron tensor, vocabulary padded."""
        return self.entry.megatron_shape(self.dims)

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """Shape on disk of each of `hf_names`."""
        return self.entry.hf_shapes(self.dims)

    @property
    def sharding(self) -> Sharding:
        """How tensor parallelism cuts it; of a stack of experts, how it cuts each of them."""
        return self.entry.cut

    @property
    def is_buffer(self) -> bool:
        """Whether Megatron holds it as an fp32 buffer instead of a parameter."""
        return self.entry.is_buffer

    @property
    def num_experts(self) -> int | None:
        """Experts in the stack, on all ranks together; None when it is no stack."""
        return self.entry.num_experts(self.dims) if isinstance(self.entry, ExpertStack) else None

    def expert(self, index: int) -> BoundEntry:
        """Expert `index` of the whole stack as a parameter of its own, without the dimension E.

        Its `shard` and `unshard` take rank and size of the expert-tensor-parallel group.

        Raises:
            UnknownParameter: there is no such expert.
        """
        stack = self.entry
        if not isinstance(stack, ExpertStack) or not 0 <= index < stack.num_experts(self.dims):
            raise UnknownParameter(
                f"{self.megatron_name} has no expert {index}, but {self.num_experts or 'none'}."
            )
        one, each = stack.expert(index), len(self.hf_names) // stack.num_experts(self.dims)
        names = self.hf_names[index * each : (index + 1) * each]
        return BoundEntry(one, self.dims, f"{self.megatron_name}[{index}]", names)

    def experts_to_hf(self, first: int, experts: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) on disk of experts that follow each other in the stack; possibly views.

        Args:
            first: number of the first of them in the whole stack.
            experts: [n, ...], each whole.

        Raises:
            UnknownParameter: the stack has no such experts.
            ShapeMismatch: one is not of the shape that a single expert has.
        """
        last = self.expert(first + len(experts) - 1)
        one, each = last.entry, len(last.hf_names)
        name = f"{self.megatron_name}[{first}:{first + len(experts)}]"
        _check_shape(name, experts, (len(experts), *last.megatron_shape))
        names = self.hf_names[first * each : (first + len(experts)) * each]
        return zip(names, one.many_to_hf(experts, self.dims), strict=True)

    def unshard_experts(self, parts: Sequence[Tensor]) -> Tensor:
        """[n, ...]: whole experts from the parts [n, ...] of all expert-tensor-parallel ranks."""
        return parts[0] if len(parts) == 1 else self.entry.unshard(parts)

    def to_hf(self, whole: Tensor) -> tuple[Tensor, ...]:
        """The tensors of `hf_names`, padding rows of the vocabulary cut off; possibly views.

        Raises:
            ShapeMismatch: `whole` is not of `megatron_shape`.
        """
        _check_shape(self.megatron_name, whole, self.megatron_shape)
        return self.entry.to_hf(whole, self.dims)

    def from_hf(self, tensors: Sequence[Tensor]) -> Tensor:
        """The whole Megatron tensor, its vocabulary padded with zeros, from those of `hf_names`.

        It may be a view of one of them.

        Raises:
            ShapeMismatch: one of them is not of `hf_shapes`.
        """
        for name, tensor, shape in zip(self.hf_names, tensors, self.hf_shapes, strict=True):
            _check_shape(name, tensor, shape)
        return self.entry.from_hf(tensors, self.dims)

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """The part of tensor-parallel rank `rank` of `size`; possibly a view.

        The ranks of experts are those of the expert-tensor-parallel group.

        Raises:
            ShapeMismatch: `whole` is not of `megatron_shape`, or does not divide over `size` ranks.
        """
        _check_shape(self.megatron_name, whole, self.megatron_shape)
        try:
            return self.entry.shard(whole, rank, size)
        except ShapeMismatch as error:
            raise ShapeMismatch(f"{self.megatron_name}: {error}") from None

    def unshard(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor from the parts of all tensor-parallel ranks, in rank order.

        Raises:
            ShapeMismatch: together they are not of `megatron_shape`.
        """
        whole = self.entry.unshard(parts)
        name = f"{self.megatron_name}, joined from {len(parts)} ranks,"
        _check_shape(name, whole, self.megatron_shape)
        return whole


@dataclass(frozen=True)
class Mapping:
    """All parameters of an architecture.

    Multi-token-prediction layers, which some folders hold after the model's own, are not trained:
    their tensors are no parameters, and only `redundant_hf_names` knows them.

    Attributes:
        top: parameters outside the layers.
        layer: parameters of each layer, relative to `decoder.layers.{i}.` and `model.layers.{i}.`.
        dense: those that only layers without experts have besides.
        moe: those that only layers with experts have besides.
        mtp_hf: names on disk, relative to the layer, of what a multi-token-prediction layer has
            besides the tensors of an ordinary one.
    """

    top: Sequence[Entry]
    layer: Sequence[Entry]
    dense: Sequence[Entry] = ()
    moe: Sequence[Entry] = ()
    mtp_hf: Sequence[str] = ()

    @cached_property
    def _top_by_name(self) -> dict[str, Entry]:
        return {entry.megatron: entry for entry in self.top}

    @cached_property
    def _by_name(self) -> dict[bool, dict[str, Entry]]:
        """Rows of layers with experts (True) and without."""
        rows = {True: (*self.layer, *self.moe), False: (*self.layer, *self.dense)}
        return {kind: {entry.megatron: entry for entry in rows[kind]} for kind in rows}

    def bind(self, megatron_name: str, dims: ModelDims) -> BoundEntry:
        """The parameter or buffer of this global Megatron name.

        Raises:
            UnknownParameter: the table has no such name, or the model no such layer, or it has
                none in that layer.
        """
        found = _MEGATRON_LAYER.fullmatch(megatron_name)
        if found is None and megatron_name in self._top_by_name:
            return self._bind_top(self._top_by_name[megatron_name], dims)
        if found and int(found[1]) < dims.num_layers:
            index = int(found[1])
            entry = self._by_name[dims.is_moe_layer(index)].get(found[2])
            if entry is not None and _applies(entry, dims):
                return self._bind_layer(entry, index, dims)
        known = self.megatron_parameters(dims)
        nearest = difflib.get_close_matches(megatron_name, known, n=1, cutoff=0.0)
        raise UnknownParameter(
            f"{megatron_name} is no parameter of this architecture with {dims.num_layers} layers; "
            f"the nearest is {nearest[0]}. Use the table of the right model_type, or add a row."
        )

    def parameters(self, dims: ModelDims) -> Iterator[BoundEntry]:
        """Every parameter and buffer once, without aliases: the top ones, then layer by layer."""
        for entry in self.top:
            bound = self._bind_top(entry, dims)
            if not bound.is_alias:
                yield bound
        for index in range(dims.num_layers):
            for entry in self._by_name[dims.is_moe_layer(index)].values():
                if _applies(entry, dims):
                    yield self._bind_layer(entry, index, dims)

    def megatron_parameters(self, dims: ModelDims) -> dict[str, Shape]:
        """Global name -> whole shape of all that a model on one pipeline stage holds."""
        return {bound.megatron_name: bound.megatron_shape for bound in self.parameters(dims)}

    def hf_parameters(self, dims: ModelDims) -> dict[str, Shape]:
        """Name -> shape of all that a checkpoint on disk holds."""
        return {
            name: shape
            for bound in self.parameters(dims)
            for name, shape in zip(bound.hf_names, bound.hf_shapes, strict=True)
        }

    def count_numbers(self, dims: ModelDims) -> int:
        """All numbers in a checkpoint on disk: those of `hf_parameters`, layers of a kind once."""
        top = (self._bind_top(entry, dims) for entry in self.top)
        num_moe = sum(dims.is_moe_layer(index) for index in range(dims.num_layers))
        layers = {True: num_moe, False: dims.num_layers - num_moe}
        return sum(_numbers(b.hf_shapes) for b in top if not b.is_alias) + sum(
            count * _numbers(entry.hf_shapes(dims))
            for is_moe, count in layers.items()
            if count
            for entry in self._by_name[is_moe].values()
            if _applies(entry, dims)
        )

    def hf_buffers(self, dims: ModelDims) -> set[str]:
        """Those of `hf_parameters` that stay fp32 in a folder of another dtype."""
        buffers = (bound for bound in self.parameters(dims) if bound.is_buffer)
        return {name for bound in buffers for name in bound.hf_names}

    def redundant_hf_names(self, dims: ModelDims) -> set[str]:
        """Names some checkpoints hold besides `hf_parameters`, to be passed over.

        They are the output layer of a tied model, and the layers for multi-token prediction, which
        are not trained.
        """
        tied = (entry for entry in self.top if isinstance(entry, TiedOr) and dims.tied)
        names = {name for entry in tied for name in entry.hf_names(dims)}
        first = dims.num_layers
        for index in range(first, first + dims.num_mtp_layers):
            names |= {f"model.layers.{index}.{name}" for name in self.mtp_hf}
            for entry in (*self.layer, *self.dense, *self.moe):
                if _applies(entry, dims):
                    names.update(self._bind_layer(entry, index, dims).hf_names)
        return names

    def _bind_top(self, entry: Entry, dims: ModelDims) -> BoundEntry:
        if isinstance(entry, TiedOr) and dims.tied:
            return BoundEntry(entry, dims, entry.megatron, (entry.tied_hf,), is_alias=True)
        return BoundEntry(entry, dims, entry.megatron, entry.hf_names(dims))

    def _bind_layer(self, entry: Entry, index: int, dims: ModelDims) -> BoundEntry:
        names = tuple(f"model.layers.{index}.{name}" for name in entry.hf_names(dims))
        return BoundEntry(entry, dims, f"decoder.layers.{index}.{entry.megatron}", names)


def _applies(entry: Entry, dims: ModelDims) -> bool:
    return entry.only_if is None or dims.has(entry.only_if)


def _numbers(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def load_mapping(model_type: str) -> Mapping:
    """The table of an architecture, by the `model_type` of its `config.json`.

    Raises:
        ConfigError: there is none.
    """
    mapping = lookup(ARCHITECTURES, model_type)
    assert isinstance(mapping, Mapping), model_type
    return mapping


def _check_shape(name: str, tensor: Tensor, expected: Shape) -> None:
    if tuple(tensor.shape) != expected:
        raise ShapeMismatch(
            f"{name} has shape {list(tensor.shape)}, but by the model's config it has "
            f"{list(expected)}: is it another model's, or do MODEL_ARGS and config.json disagree?"
        )
