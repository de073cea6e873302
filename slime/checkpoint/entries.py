"""The vocabulary of a mapping: what one Megatron parameter is on disk, both ways.

Every entry is data: two names (relative to the layer, for entries of a layer) and how the tensors
behind them relate. Braces in a name stand for several names, in that order: `{q,k,v}_proj` is
`q_proj`, `k_proj`, `v_proj`; in entries of experts `{e}` is the expert's number.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, override

from slime.checkpoint import sharding
from slime.checkpoint.dims import Axis, Feature, ModelDims
from slime.checkpoint.sharding import Sharding, joined, stacked

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry(ABC):
    """One Megatron parameter and its one or more tensors on disk.

    Attributes:
        megatron: Megatron's name.
        hf: Hugging Face's name or names.
        only_if: what a model needs to have this parameter; None for all of the family.
        is_buffer: Megatron holds it as a buffer, in fp32 whatever the model's dtype: it is loaded,
            saved and synced like a parameter, but not trained.
    """

    megatron: str
    hf: str
    only_if: Feature | None = field(default=None, kw_only=True)
    is_buffer: bool = field(default=False, kw_only=True)

    def hf_names(self, dims: ModelDims) -> tuple[str, ...]:
        """The names on disk, in the order `from_hf` takes and `to_hf` gives."""
        del dims  # only the number of experts changes the names
        braces = re.search(r"\{(.*?)\}", self.hf)
        if braces is None:
            return (self.hf,)
        return tuple(self.hf.replace(braces[0], word) for word in braces[1].split(","))

    @property
    @abstractmethod
    def cut(self) -> Sharding:
        """How the whole Megatron tensor is cut over tensor-parallel ranks."""

    @abstractmethod
    def megatron_shape(self, dims: ModelDims) -> Shape:
        """Shape of the whole Megatron tensor."""

    @abstractmethod
    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        """Shape on disk of each of `hf_names`."""

    @abstractmethod
    def from_hf(self, tensors: Sequence[Tensor], dims: ModelDims) -> Tensor:
        """The whole Megatron tensor, from tensors of `hf_shapes`."""

    @abstractmethod
    def to_hf(self, whole: Tensor, dims: ModelDims) -> tuple[Tensor, ...]:
        """The tensors of `hf_names`, from one of `megatron_shape`; the inverse of `from_hf`."""

    def many_to_hf(self, wholes: Tensor, dims: ModelDims) -> Sequence[Tensor]:
        """`to_hf` of each of `wholes`, [n, ...], one after the other; a few operations for all, where it can be."""
        return [tensor for whole in wholes for tensor in self.to_hf(whole, dims)]

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """The part of tensor-parallel rank `rank` of `size`.

        Raises:
            ShapeMismatch: the cut dimension does not divide evenly.
        """
        return sharding.shard(whole, self.cut, rank, size)

    def unshard(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor from the parts of all ranks, in rank order; the inverse of `shard`."""
        return sharding.unshard(parts, self.cut)


@dataclass(frozen=True)
class Rename(Entry):
    """The same tensor under another name.

    Attributes:
        shape: its axes on disk.
        sharding: how tensor parallelism cuts it.
        padded_vocab: a `[V, H]` matrix whose rows Megatron pads with zeros and cuts over the ranks;
            `shape` and `sharding` then need not be given.
    """

    shape: tuple[Axis, ...] = ("hidden",)
    sharding: Sharding = "replicated"
    padded_vocab: bool = False

    @property
    @override
    def cut(self) -> Sharding:
        return "column" if self.padded_vocab else self.sharding

    @override
    def megatron_shape(self, dims: ModelDims) -> Shape:
        if self.padded_vocab:
            return (dims.padded_vocab_size, dims.hidden)
        return dims.axes(self.shape)

    @override
    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        return (dims.axes(("vocab_size", "hidden") if self.padded_vocab else self.shape),)

    @override
    def from_hf(self, tensors: Sequence[Tensor], dims: ModelDims) -> Tensor:
        (tensor,) = tensors
        missing = dims.padded_vocab_size - dims.vocab_size if self.padded_vocab else 0
        return joined([tensor, tensor.new_zeros(missing, dims.hidden)]) if missing else tensor

    @override
    def to_hf(self, whole: Tensor, dims: ModelDims) -> tuple[Tensor, ...]:
        return (whole[: dims.vocab_size] if self.padded_vocab else whole,)

    @override
    def many_to_hf(self, wholes: Tensor, dims: ModelDims) -> Sequence[Tensor]:
        return super().many_to_hf(wholes, dims) if self.padded_vocab else wholes.unbind()


@dataclass(frozen=True)
class TiedOr(Rename):
    """A `Rename`, or, in a model with tied embeddings, a second copy of the tensor `tied_hf`.

    Megatron holds such a copy only on a last pipeline stage that is not also the first: it is
    filled from the embedding and never written.
    """

    tied_hf: str = "model.embed_tokens.weight"


@dataclass(frozen=True)
class FusedQKV(Entry):
    """Query, key and value projections, weight or bias, in Megatron's one tensor.

    Megatron orders rows by query group: the queries of a group, its key, its value, then the next
    group; so that cutting dim 0 gives whole groups to each rank.
    """

    @property
    @override
    def cut(self) -> Sharding:
        return "column"

    def _tail(self, dims: ModelDims) -> Shape:
        return () if self.megatron.endswith(".bias") else (dims.hidden,)

    @override
    def megatron_shape(self, dims: ModelDims) -> Shape:
        return (dims.query_size + 2 * dims.key_value_size, *self._tail(dims))

    @override
    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        tail = self._tail(dims)
        return (
            (dims.query_size, *tail),
            (dims.key_value_size, *tail),
            (dims.key_value_size, *tail),
        )

    @override
    def from_hf(self, tensors: Sequence[Tensor], dims: ModelDims) -> Tensor:
        tail = self._tail(dims)
        grouped = [tensor.reshape(dims.num_query_groups, -1, *tail) for tensor in tensors]
        return joined(grouped, 1).reshape(-1, *tail)

    @override
    def to_hf(self, whole: Tensor, dims: ModelDims) -> tuple[Tensor, ...]:
        tail, queries = self._tail(dims), dims.query_size // dims.num_query_groups
        grouped = whole.reshape(dims.num_query_groups, queries + 2 * dims.head_dim, *tail)
        key, value = queries, queries + dims.head_dim
        split = grouped[:, :key], grouped[:, key:value], grouped[:, value:]
        return tuple(tensor.reshape(-1, *tail) for tensor in split)


@dataclass(frozen=True)
class GateUp(Entry):
    """The gate and the up projection of a gated MLP, one above the other in Megatron.

    Attributes:
        ffn: width of one of them.
    """

    ffn: Axis = "ffn"

    @property
    @override
    def cut(self) -> Sharding:
        return "gate_up"

    @override
    def megatron_shape(self, dims: ModelDims) -> Shape:
        (ffn,) = dims.axes((self.ffn,))
        return (2 * ffn, dims.hidden)

    @override
    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        return (dims.axes((self.ffn, "hidden")),) * 2

    @override
    def from_hf(self, tensors: Sequence[Tensor], dims: ModelDims) -> Tensor:
        return joined(tensors)

    @override
    def to_hf(self, whole: Tensor, dims: ModelDims) -> tuple[Tensor, ...]:
        return whole.chunk(2)

    @override
    def many_to_hf(self, wholes: Tensor, dims: ModelDims) -> Sequence[Tensor]:
        count, rows, hidden = wholes.shape
        return wholes.reshape(2 * count, rows // 2, hidden).unbind()


@dataclass(frozen=True)
class ExpertStack(Entry):
    """The matrices `one` of all experts of a layer: `[E, ...]` in Megatron, apart on disk.

    The tensor-parallel ranks here are those of the experts' own group, --expert-tensor-parallel-size.
    Take single experts with `expert` where memory matters: the methods of the stack handle all.
    Make one with `expert_stack`.

    Attributes:
        one: the entry of one expert; `{e}` in its name on disk is the expert's number.
    """

    one: Entry

    def expert(self, index: int) -> Entry:
        """The entry of expert `index`."""
        return replace(self.one, hf=self.hf.replace("{e}", str(index)))

    @override
    def hf_names(self, dims: ModelDims) -> tuple[str, ...]:
        experts = range(self.num_experts(dims))
        return tuple(name for e in experts for name in self.expert(e).hf_names(dims))

    def num_experts(self, dims: ModelDims) -> int:
        """Experts of one layer, on all ranks together."""
        return dims.axes(("num_experts",))[0]

    @property
    @override
    def cut(self) -> Sharding:
        return self.one.cut

    @override
    def megatron_shape(self, dims: ModelDims) -> Shape:
        return (self.num_experts(dims), *self.one.megatron_shape(dims))

    @override
    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        return self.one.hf_shapes(dims) * self.num_experts(dims)

    @override
    def from_hf(self, tensors: Sequence[Tensor], dims: ModelDims) -> Tensor:
        each = len(tensors) // self.num_experts(dims)
        starts = range(0, len(tensors), each)
        return stacked([self.one.from_hf(tensors[i : i + each], dims) for i in starts])

    @override
    def to_hf(self, whole: Tensor, dims: ModelDims) -> tuple[Tensor, ...]:
        return tuple(self.one.many_to_hf(whole, dims))

    @override
    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        return stacked([self.one.shard(expert, rank, size) for expert in whole])

    @override
    def unshard(self, parts: Sequence[Tensor]) -> Tensor:
        return sharding.unshard(parts, self.cut, stack=True)


def expert_stack(one: Entry) -> ExpertStack:
    """The stack of what `one` is for a single expert; `{e}` in its name on disk is the number."""
    return ExpertStack(one.megatron, one.hf, only_if=one.only_if, one=one)
