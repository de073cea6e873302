"""RolloutBatch: the samples of one rollout as columns, cut for one data-parallel rank."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from slime.data.packed import Row

# `RolloutBatch.sample_indices` of a row that evens ranks out: it trains nothing, no metric counts it.
FILLER_INDEX = -1

_NUMPY_DTYPES: dict[torch.dtype, type[np.generic]] = {
    torch.int64: np.int64,
    torch.float32: np.float32,
}


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one flat tensor, so that a batch travels as a few large arrays.

    Attributes:
        values: [sum(lengths)] all rows, one after the other.
        lengths: length of each row.
    """

    values: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.values.dim() != 1 or self.values.numel() != sum(self.lengths):
            raise ValueError(
                f"Ragged: {tuple(self.values.shape)} values do not hold rows of total length {sum(self.lengths)}"
            )

    @classmethod
    def from_rows(cls, rows: Iterable[Tensor | Row], dtype: torch.dtype) -> "Ragged":
        """Copy rows, each a [n] tensor or array or a list of numbers, into one flat tensor of `dtype`."""
        rows = list(rows)
        if rows and all(type(row) is list for row in rows):
            # One tensor from all numbers: a small one for each row takes several times as long.
            lengths = tuple(map(len, rows))
            numbers = cast(Iterable[float], chain.from_iterable(rows))
            return cls(_flat_tensor(numbers, sum(lengths), dtype), lengths)
        if dtype in _NUMPY_DTYPES and all(isinstance(row, np.ndarray | list) for row in rows):
            return cls(_joined(rows, dtype), tuple(map(len, rows)))
        tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
        lengths = tuple(tensor.numel() for tensor in tensors)
        return cls(torch.cat(tensors) if tensors else torch.empty(0, dtype=dtype), lengths)

    @classmethod
    def constant_rows(
        cls,
        numbers: Sequence[float],
        lengths: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> "Ragged":
        """Rows of these lengths, each one number repeated."""
        per_row = torch.tensor(numbers, dtype=dtype)
        return cls(
            per_row.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)), tuple(lengths)
        )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where in `values` each row begins."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    def rows(self) -> list[Tensor]:
        """Views of the rows, no copy."""
        return list(torch.split(self.values, list(self.lengths))) if self.lengths else []

    def select(self, indexes: Sequence[int]) -> "Ragged":
        """The rows at `indexes`, in that order, copied."""
        rows = self.rows()
        return Ragged.from_rows([rows[i] for i in indexes], self.values.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows())


def _flat_tensor(numbers: Iterable[float], count: int, dtype: torch.dtype) -> Tensor:
    """[count] numbers as a tensor; numpy reads Python numbers three times as fast as torch."""
    kind = _NUMPY_DTYPES.get(dtype)
    if kind is None:
        return torch.tensor(list(numbers), dtype=dtype)
    array = np.fromiter(numbers, dtype=kind, count=count)
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]


def _joined(rows: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Arrays and lists one after the other."""
    flat = np.concatenate([np.asarray(row, _NUMPY_DTYPES[dtype]) for row in rows])
    return torch.from_numpy(flat)  # pyright: ignore[reportUnknownMemberType]


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one optimizer step consumes on one data-parallel rank, and the denominators of the whole step.

    Attributes:
        micro_batches: for each forward/backward the positions of its samples in this rank's batch.
        num_rollouts: executions (distinct rollout ids) in this step over all ranks; a fan-out
            counts once.
        num_tokens: trainable tokens (sum of loss masks) in this step over all ranks.
        num_samples: samples in this step over all ranks.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    num_rollouts: int
    num_tokens: float
    num_samples: int


@dataclass(kw_only=True)
class RolloutBatch:
    """Columns with one entry per sample of this data-parallel rank. Ragged columns are CPU tensors.

    Attributes:
        rollout_id: number of the round.
        tokens: int64, rows [S] = prompt and response ids.
        response_lengths: R of each sample, R < S.
        loss_masks: fp32, rows [R], 1 = train on this token.
        rewards: after normalisation, one scalar per sample.
        raw_rewards: before normalisation.
        rollout_ids: execution of each sample; siblings of one fan-out share it.
        rollout_mask_sums: trainable tokens of the whole execution, over all its samples and ranks.
        sample_indices: `Sample.index`, for logs and dumps.
        truncated: True when the answer was cut by its length limit.
        rollout_log_probs: fp32, rows [R], by the engine; None when no sample has them.
        teacher_log_probs: fp32, rows [R]; None when no sample has them.
        rollout_routed_experts: int16 [S - 1, layers, experts per token] of each sample, as the
            engine chose them; a row of -1 was not recorded, None = none of the sample. None when
            no sample has them.
        steps: the optimizer steps of this round, in order.
        extras: optional columns for plugins (`metadata`, `round_number`, ...), each a list of one
            entry per sample.
    """

    rollout_id: int
    tokens: Ragged
    response_lengths: tuple[int, ...]
    loss_masks: Ragged
    rewards: tuple[float, ...]
    raw_rewards: tuple[float, ...]
    rollout_ids: tuple[int, ...]
    rollout_mask_sums: tuple[float, ...]
    sample_indices: tuple[int, ...]
    truncated: tuple[bool, ...]
    rollout_log_probs: Ragged | None = None
    teacher_log_probs: Ragged | None = None
    rollout_routed_experts: tuple[Tensor | None, ...] | None = None
    steps: tuple[StepPlan, ...] = ()
    extras: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])

    def samples_of_step(self, step: int) -> list[int]:
        """`sample_indices` of the rows this rank computes on in one optimizer step, fillers apart."""
        rows = (row for micro_batch in self.steps[step].micro_batches for row in micro_batch)
        return [index for row in rows if (index := self.sample_indices[row]) != FILLER_INDEX]

    def __len__(self) -> int:
        return len(self.response_lengths)
