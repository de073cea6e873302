"""One round of samples, cut into a RolloutBatch per data-parallel rank."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slime.config.config import Config
from slime.data.batch import FILLER_INDEX, Ragged, RolloutBatch, StepPlan
from slime.data.packed import row_sum
from slime.data.sample import Sample
from slime.errors import DataError
from slime.training.interface import Metrics
from slime.training.schedule import Schedule, StepSchedule, plan_steps, schedule_options
from slime.training.train_data import (
    KNOWN,
    TrainData,
    complete_train_data,
    samples_to_train_data,
)

logger = logging.getLogger(__name__)

_MOST_EXPERTS = 2**15 - 1


def make_rollout_batches(
    samples: Sequence[Sample],
    rewards: Sequence[float],
    raw_rewards: Sequence[float],
    config: Config,
    *,
    rollout_id: int,
    dp_size: int,
    cp_size: int = 1,
    micro_batch_multiple: int = 1,
) -> list[RolloutBatch]:
    """One batch per data-parallel rank, with the plans of all optimizer steps.

    `remove_sample` samples are counted but train on nothing. Executions beyond the last whole step
    of `global_batch_size` are left out; a warning says so, and `batch_metrics` counts them.

    Args:
        samples: of the round, siblings of a fan-out sharing `rollout_id`.
        rewards, raw_rewards: after and before normalisation, one per sample.
        config: batch sizes and packing flags.
        rollout_id: number of the round.
        dp_size, cp_size: parallel sizes of the trainer.
        micro_batch_multiple: of the micro-batches per rank and step; for interleaved pipelines.

    Raises:
        ConfigError: there are fewer executions than one step takes.
        DataError: lists of a sample do not fit together.
    """
    data = samples_to_train_data(samples, rewards, raw_rewards)
    return batches_from_train_data(
        data,
        config,
        rollout_id=rollout_id,
        dp_size=dp_size,
        cp_size=cp_size,
        micro_batch_multiple=micro_batch_multiple,
    )


def batches_from_train_data(
    data: Mapping[str, Sequence[Any]],
    config: Config,
    *,
    rollout_id: int,
    dp_size: int,
    cp_size: int = 1,
    micro_batch_multiple: int = 1,
) -> list[RolloutBatch]:
    """The same from columns (see `train_data.py`); unknown ones travel in `RolloutBatch.extras`."""
    full = complete_train_data(data)
    options = schedule_options(
        config, dp_size=dp_size, cp_size=cp_size, micro_batch_multiple=micro_batch_multiple
    )
    lengths = [len(tokens) for tokens in full["tokens"]]
    schedule = plan_steps(full["rollout_ids"], lengths, options)
    if schedule.dropped:
        executions = {full["rollout_ids"][i] for i in schedule.dropped}
        logger.warning(
            "rollout %d: %d executions (%d samples) beyond the last whole step of %d do not train",
            rollout_id,
            len(executions),
            len(schedule.dropped),
            options.global_batch_size,
        )
    totals = [_totals(full, step) for step in schedule.steps]
    _add_filler(full, lengths)
    return [_rank_batch(full, schedule, totals, rank, rollout_id) for rank in range(dp_size)]


def batch_metrics(
    num_samples: int, num_executions: int, batches: Sequence[RolloutBatch]
) -> Metrics:
    """What became of the samples of a round.

    Args:
        num_samples, num_executions: before batching.
        batches: of all data-parallel ranks.

    Returns:
        `dropped_samples`, `dropped_executions`: left out, see `make_rollout_batches`;
        `num_micro_batches`: per rank, over all steps; `filler_samples`: see `FILLER_INDEX`;
        `rank_tokens_max_over_mean`: 1.0 when all ranks have the same number of tokens.
    """
    kept_samples = sum(plan.num_samples for plan in batches[0].steps)
    kept_executions = sum(plan.num_rollouts for plan in batches[0].steps)
    tokens = [sum(batch.tokens.lengths) for batch in batches]
    return {
        "dropped_samples": float(num_samples - kept_samples),
        "dropped_executions": float(num_executions - kept_executions),
        "num_micro_batches": float(sum(len(plan.micro_batches) for plan in batches[0].steps)),
        "filler_samples": float(sum(b.sample_indices.count(FILLER_INDEX) for b in batches)),
        "rank_tokens_max_over_mean": max(tokens) * len(tokens) / sum(tokens),
    }


def _add_filler(data: TrainData, lengths: Sequence[int]) -> None:
    """Append one row that trains nothing: the first two tokens of the shortest sample, masked.

    An empty micro-batch would need a special case in every backend; two tokens cost next to
    nothing.
    """
    shortest = min(range(len(lengths)), key=lengths.__getitem__)
    for name, column in data.items():
        column.append(column[shortest] if name in KNOWN else None)
    data["tokens"][-1] = list(data["tokens"][shortest])[:2]
    data["response_lengths"][-1] = len(data["tokens"][-1]) - 1
    for name in ("loss_masks", "rollout_log_probs", "teacher_log_probs"):
        if name in data:
            data[name][-1] = [0.0] * data["response_lengths"][-1]
    if "rollout_routed_experts" in data:
        data["rollout_routed_experts"][-1] = None
    data["rewards"][-1] = data["raw_reward"][-1] = 0.0
    data["truncated"][-1] = 0
    data["sample_indices"][-1] = data["rollout_ids"][-1] = FILLER_INDEX
    data["rollout_mask_sums"][-1] = 0.0


def _totals(data: TrainData, step: StepSchedule) -> StepPlan:
    """A plan without micro-batches: what all ranks know about the step."""
    return StepPlan(
        micro_batches=(),
        num_rollouts=len({data["rollout_ids"][i] for i in step.positions}),
        num_tokens=sum(float(row_sum(data["loss_masks"][i])) for i in step.positions),
        num_samples=len(step.positions),
    )


def _rank_batch(
    data: TrainData, schedule: Schedule, totals: Sequence[StepPlan], rank: int, rollout_id: int
) -> RolloutBatch:
    """The rows of one rank, in the order in which its micro-batches read them."""
    order: list[int] = []
    plans: list[StepPlan] = []
    for step, total in zip(schedule.steps, totals, strict=True):
        micro_batches: list[tuple[int, ...]] = []
        for positions in step.ranks[rank]:
            rows = positions or (len(data["tokens"]) - 1,)
            micro_batches.append(tuple(range(len(order), len(order) + len(rows))))
            order.extend(rows)
        plans.append(replace(total, micro_batches=tuple(micro_batches)))
    return _select(data, order, tuple(plans), rollout_id)


def _select(
    data: TrainData, order: Sequence[int], plans: tuple[StepPlan, ...], rollout_id: int
) -> RolloutBatch:
    def column(name: str) -> list[Any]:
        values = data[name]
        return [values[i] for i in order]

    def ragged(name: str) -> Ragged | None:
        return Ragged.from_rows(column(name), torch.float32) if name in data else None

    return RolloutBatch(
        rollout_id=rollout_id,
        tokens=Ragged.from_rows(column("tokens"), torch.int64),
        response_lengths=tuple(map(int, column("response_lengths"))),
        loss_masks=Ragged.from_rows(column("loss_masks"), torch.float32),
        rewards=tuple(map(float, column("rewards"))),
        raw_rewards=tuple(map(float, column("raw_reward"))),
        rollout_ids=tuple(map(int, column("rollout_ids"))),
        rollout_mask_sums=tuple(map(float, column("rollout_mask_sums"))),
        sample_indices=tuple(map(int, column("sample_indices"))),
        truncated=tuple(map(bool, column("truncated"))),
        rollout_log_probs=ragged("rollout_log_probs"),
        teacher_log_probs=ragged("teacher_log_probs"),
        rollout_routed_experts=_routed_experts(data, order),
        steps=plans,
        extras={name: column(name) for name in data if name not in KNOWN},
    )


def _routed_experts(data: TrainData, order: Sequence[int]) -> tuple[Tensor | None, ...] | None:
    """Half as large as the engine gives them: they are the largest column by far.

    Raises:
        DataError: what a sample has are no numbers of experts.
    """
    if "rollout_routed_experts" not in data:
        return None
    rows, indices = data["rollout_routed_experts"], data["sample_indices"]
    return tuple([_narrow(rows[i], indices[i]) for i in order])


def _narrow(experts: Any, index: int) -> Tensor | None:
    if experts is None:
        return None
    array = np.asarray(experts)
    is_number = array.dtype.kind in "iu" and array.ndim == 3
    if not is_number or (array.size and not -1 <= array.min() <= array.max() <= _MOST_EXPERTS):
        raise DataError(
            f"sample {index}: rollout_routed_experts must be numbers of experts, [tokens - 1, "
            f"layers, experts per token]; found {array.dtype} {list(array.shape)}"
        )
    return torch.from_numpy(array.astype(np.int16))  # pyright: ignore[reportUnknownMemberType]
