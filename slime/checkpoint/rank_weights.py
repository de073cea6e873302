"""The weights of a checkpoint in Megatron's format `torch`: which ranks' parts make a parameter.

Layers follow each other through the pipeline ranks' first virtual stages, then through their second
ones. So the files themselves tell which layers a stage has, however unevenly they are spread.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slime.checkpoint.dims import ModelDims
from slime.checkpoint.hf import check_names
from slime.checkpoint.mapping import BoundEntry
from slime.checkpoint.rank_files import Chunk, RankFiles
from slime.checkpoint.saved_names import rank_expert_names, rank_names
from slime.checkpoint.settings import effective_value
from slime.errors import CheckpointError, ShapeMismatch

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EMBEDDING = "embedding.word_embeddings.weight"
# In a tied model the last of several pipeline stages has a copy of the embedding under this name.
_OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class _Stage:
    """A part of the model as one rank of a pipeline holds it.

    Attributes:
        first_layer, num_layers: those of the whole model that it has.
    """

    pp_rank: int
    vp_rank: int
    first_layer: int
    num_layers: int


@dataclass(frozen=True)
class _Source:
    """A rank's part of a matrix.

    Attributes:
        names: one of which it has in the rank's file.
        stack: the name it has there where the rank's experts are one tensor, with `number` among them.
    """

    tp_rank: int
    ep_rank: int
    stage: _Stage
    names: tuple[str, ...]
    stack: str | None = None
    number: int = 0


class RankWeights:
    """See `StoredWeights`: of the format `torch`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = RankFiles(path)
        self._layout = self._files.layout
        # Ranks that differ in their experts only hold the same of all else.
        self._ep_rank_of = dict(sorted(self._layout.stage_ranks(), reverse=True))
        self._stages = list(self._find_stages())

    def _find_stages(self) -> Iterator[_Stage]:
        first = 0
        for vp_rank in range(self._layout.vpp_size):
            for pp_rank in range(self._layout.pp_size):
                chunk = self._files.chunk(0, pp_rank, 0, vp_rank)
                numbers = {int(found[1]) for name in chunk if (found := _LAYER.match(name))}
                if numbers != set(range(len(numbers))):
                    raise CheckpointError(
                        f"{self._files.file(0, pp_rank, 0)} has layers {sorted(numbers)} with a gap "
                        f"in virtual stage {vp_rank}; is it damaged?"
                    )
                yield _Stage(pp_rank, vp_rank, first, len(numbers))
                first += len(numbers)

    def resume_key(self) -> str:
        stats = [(str(file.resolve()), file.stat()) for file in self._files.files()]
        return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])

    def num_vocab_rows(self) -> int | None:
        part = self._files.chunk(0, 0, 0, 0).get(_EMBEDDING)
        return None if part is None else part.shape[0] * self._layout.tp_size

    def check(self, bounds: Sequence[BoundEntry], dims: ModelDims) -> None:
        self._check_args(dims)
        num_layers = self._stages[-1].first_layer + self._stages[-1].num_layers
        if num_layers != dims.num_layers:
            raise CheckpointError(
                f"The stages of {self.path} have {num_layers} layers together, the config of "
                f"--origin-hf-dir {dims.num_layers}; is it of this model?"
            )
        if dims.moe is not None and dims.moe.num_experts % self._layout.ep_size:
            raise CheckpointError(
                f"{self.path} is of {self._layout.ep_size} expert-parallel ranks, over which the "
                f"{dims.moe.num_experts} experts of --origin-hf-dir do not divide."
            )
        self._check_names(bounds, dims)
        for bound in bounds:
            for one, sources in self._sources(bound, dims):
                parts = [self._part(source).to("meta") for source in sources]
                self._join(one, parts)

    def _check_args(self, dims: ModelDims) -> None:
        """Heads and their like, which shapes alone do not tell."""
        expected: dict[str, Any] = {
            "hidden_size": dims.hidden,
            "num_attention_heads": dims.num_heads,
        }
        if (mla := dims.mla) is None:
            expected |= {"num_query_groups": dims.num_query_groups, "kv_channels": dims.head_dim}
        else:
            names = ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
            expected |= {name: getattr(mla, name) for name in names}
        args = vars(self._files.args)
        try:
            found = {name: effective_value(args, name) for name in expected}
        except KeyError as error:
            raise CheckpointError(
                f"The args in {self.path} lack {error}; are they whole?"
            ) from None
        wrong = [
            f"{name} {found[name]} instead of {value}"
            for name, value in expected.items()
            if found[name] != value
        ]
        if wrong:
            raise CheckpointError(
                f"{self.path} is of another size than the config of --origin-hf-dir: "
                f"{', '.join(wrong)}."
            )

    def _check_names(self, bounds: Sequence[BoundEntry], dims: ModelDims) -> None:
        """Every file has the parameters of its stage, under one of their names, and no others."""
        by_stage: dict[_Stage, list[BoundEntry]] = {stage: [] for stage in self._stages}
        for bound in bounds:
            by_stage[self._stage_of(bound)[0]].append(bound)
        for stage, held in by_stage.items():
            for tp_rank, ep_rank in sorted(self._layout.stage_ranks()):
                chunk = self._chunk(tp_rank, ep_rank, stage)
                expected = {name for bound in held for name in self._names_in(chunk, bound, dims)}
                virtual = f" (virtual stage {stage.vp_rank})" if self._layout.vpp_size > 1 else ""
                check_names(
                    chunk,
                    expected,
                    ignored={_OUTPUT} if dims.tied else (),
                    where=f"{self._files.file(tp_rank, stage.pp_rank, ep_rank)}{virtual}",
                )

    def _names_in(self, chunk: Chunk, bound: BoundEntry, dims: ModelDims) -> Iterator[str]:
        """The names of a rank's part of the parameter: those it has, or else those it should have."""
        stack, prefix = self._names(bound, dims)
        if bound.num_experts is None or stack[0] in chunk:
            yield _present(chunk, stack) or stack[0]
            return
        for number in range(bound.num_experts // self._layout.ep_size):
            names = [prefix + name for name in rank_expert_names(bound.megatron_name, number)]
            yield _present(chunk, names) or names[0]

    def matrices(
        self, bound: BoundEntry, dims: ModelDims
    ) -> Iterator[tuple[BoundEntry, Callable[[], Tensor]]]:
        for one, sources in self._sources(bound, dims):
            yield one, lambda one=one, sources=sources: self._whole(one, sources)

    def _whole(self, one: BoundEntry, sources: list[_Source]) -> Tensor:
        parts = [self._part(source) for source in sources]
        self._files.count(sum(part.nbytes for part in parts))
        return self._join(one, parts)

    def _join(self, one: BoundEntry, parts: list[Tensor]) -> Tensor:
        kinds = {(tuple(part.shape), part.dtype) for part in parts}
        if len(kinds) > 1:
            raise ShapeMismatch(
                f"{self.path}: the ranks' parts of {one.megatron_name} differ: "
                f"{', '.join(f'{list(shape)} in {dtype}' for shape, dtype in sorted(kinds, key=str))}."
            )
        return one.unshard(parts)

    def _sources(
        self, bound: BoundEntry, dims: ModelDims
    ) -> Iterator[tuple[BoundEntry, list[_Source]]]:
        """(a matrix, its parts in the order of tensor-parallel ranks)."""
        stage, _ = self._stage_of(bound)
        names, prefix = self._names(bound, dims)
        if bound.num_experts is None:
            ranks = sorted(self._ep_rank_of.items())
            yield bound, [_Source(tp_rank, ep_rank, stage, names) for tp_rank, ep_rank in ranks]
            return
        per_rank = bound.num_experts // self._layout.ep_size
        for expert in range(bound.num_experts):
            ep_rank, number = divmod(expert, per_rank)
            inner = rank_expert_names(bound.megatron_name, number)
            yield (
                bound.expert(expert),
                [
                    _Source(
                        tp_rank,
                        ep_rank,
                        stage,
                        tuple(prefix + name for name in inner),
                        stack=names[0],
                        number=number,
                    )
                    for tp_rank in self._expert_tp_ranks(ep_rank)
                ],
            )

    def _expert_tp_ranks(self, ep_rank: int) -> list[int]:
        """The tensor ranks in whose files the experts' tensor ranks 0, 1, ... of `ep_rank` are."""
        held = [tp for tp, ep in sorted(self._layout.stage_ranks()) if ep == ep_rank]
        of_expert_rank = {tp % self._layout.etp_size: tp for tp in reversed(held)}
        return [of_expert_rank[rank] for rank in range(self._layout.etp_size)]

    def _part(self, source: _Source) -> Tensor:
        chunk = self._chunk(source.tp_rank, source.ep_rank, source.stage)
        if source.stack is not None and source.stack in chunk:
            return chunk[source.stack][source.number]
        name = _present(chunk, source.names)
        assert name is not None, "checked with the names"
        return chunk[name]

    def _chunk(self, tp_rank: int, ep_rank: int, stage: _Stage) -> Chunk:
        return self._files.chunk(tp_rank, stage.pp_rank, ep_rank, stage.vp_rank)

    def _stage_of(self, bound: BoundEntry) -> tuple[_Stage, int]:
        """(the stage that has the parameter, the number its layer has there; -1 in no layer)."""
        found = _LAYER.match(bound.megatron_name)
        if found is None:
            is_first = bound.megatron_name == _EMBEDDING
            return self._stages[0 if is_first else -1], -1
        layer = int(found[1])
        for stage in self._stages:
            if stage.first_layer <= layer < stage.first_layer + stage.num_layers:
                return stage, layer - stage.first_layer
        raise AssertionError(f"{bound.megatron_name}: the layers were counted")

    def _names(self, bound: BoundEntry, dims: ModelDims) -> tuple[tuple[str, ...], str]:
        """(names that the parameter may have in its stage, what all of its layer begin with)."""
        _, number = self._stage_of(bound)
        prefix = "" if number < 0 else f"decoder.layers.{number}."
        return tuple(prefix + name for name in rank_names(bound.megatron_name, dims)), prefix


def _present(chunk: Chunk, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in chunk), None)
