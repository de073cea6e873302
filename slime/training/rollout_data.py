"""The round's data of one rank as plugins know it; loss columns and means made of it."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from slime.data.batch import FILLER_INDEX, Ragged, RolloutBatch
from slime.errors import DataError
from slime.training.interface import Metrics
from slime.training.masked import SumOverDp

# Name -> one entry per sample of this rank; what has a value per token is a list of [R] tensors.
RolloutData = dict[str, Any]

# Column of the loss -> column of the rollout data.
_LOSS_COLUMNS = {
    "loss_mask": "loss_masks",
    "advantages": "advantages",
    "old_log_probs": "log_probs",
    "ref_log_probs": "ref_log_probs",
    "rollout_log_probs": "rollout_log_probs",
}
# What a loss of the user's own may read besides.
_CUSTOM_LOSS_COLUMNS = {name: name for name in ("returns", "values", "teacher_log_probs")}
_TOKEN_METRICS = (
    "log_probs",
    "ref_log_probs",
    "rollout_log_probs",
    "teacher_log_probs",
    "advantages",
    "returns",
    "values",
    "kl",
)
_SAMPLE_METRICS = ("rewards", "raw_reward", "response_lengths", "total_lengths", "truncated")


def make_rollout_data(batch: RolloutBatch) -> RolloutData:
    """The columns of a batch under their documented names; ragged ones are views, not copies."""
    data: RolloutData = {
        **batch.extras,
        "tokens": batch.tokens.rows(),
        "response_lengths": list(batch.response_lengths),
        "total_lengths": list(batch.tokens.lengths),
        "loss_masks": batch.loss_masks.rows(),
        "rewards": list(batch.rewards),
        "raw_reward": list(batch.raw_rewards),
        "truncated": [int(value) for value in batch.truncated],
        "sample_indices": list(batch.sample_indices),
        "rollout_ids": list(batch.rollout_ids),
        "rollout_mask_sums": list(batch.rollout_mask_sums),
    }
    if batch.rollout_log_probs is not None:
        data["rollout_log_probs"] = batch.rollout_log_probs.rows()
    if batch.teacher_log_probs is not None:
        data["teacher_log_probs"] = batch.teacher_log_probs.rows()
    if batch.rollout_routed_experts is not None:
        data["rollout_routed_experts"] = list(batch.rollout_routed_experts)
    return data


def check_rows(data: RolloutData, flag: str, *, required: Sequence[str] = ()) -> None:
    """Check what the user function behind `flag` left in the columns the loss reads.

    Raises:
        DataError: a column is missing, or one of its rows does not fit the response.
    """
    lengths = data["response_lengths"]
    for name in (*_LOSS_COLUMNS.values(), "returns"):
        rows = data.get(name)
        if rows is None and name in required:
            raise DataError(f"{flag}: the function must fill rollout_data[{name!r}]")
        if rows is None:
            continue
        found = [row.numel() if isinstance(row, Tensor) else None for row in rows]
        if found != lengths:
            raise DataError(
                f"{flag}: rollout_data[{name!r}] must hold one tensor [R] per sample, with R = "
                f"{lengths[:4]}...; found {found[:4]}..."
            )


def loss_columns(
    batch: RolloutBatch, data: RolloutData, *, per_token: bool, is_custom: bool = False
) -> dict[str, list[Tensor]]:
    """The columns a loss reads, [R] fp32 per sample; `weight` follows the masks as they are now.

    Args:
        is_custom: the loss is the user's own, who may read more.
    """
    sources = _LOSS_COLUMNS | _CUSTOM_LOSS_COLUMNS if is_custom else _LOSS_COLUMNS
    columns: dict[str, list[Tensor]] = {
        name: [_plain_fp32(row) for row in data[source]]
        for name, source in sources.items()
        if source in data
    }
    columns["weight"] = token_weights(batch, columns["loss_mask"], per_token=per_token)
    return columns


def token_weights(batch: RolloutBatch, masks: Sequence[Tensor], *, per_token: bool) -> list[Tensor]:
    """[R] per sample: what a token's value counts in the sum that is its optimizer step's mean.

    Args:
        masks: [R] fp32 per sample; they may be narrower than `batch.loss_masks`, whose totals stay
            the denominator.
        per_token: mean over all trainable tokens of the step. Otherwise the mean over executions of
            the mean over their tokens; an execution without any counts, and adds 0.
    """
    if not masks:
        return []
    denominators = [math.inf] * len(masks)  # a sample in no step weighs nothing
    for plan in batch.steps:
        num_tokens, num_rollouts = max(plan.num_tokens, 1.0), max(plan.num_rollouts, 1)
        for position in chain.from_iterable(plan.micro_batches):
            denominators[position] = (
                num_tokens
                if per_token
                else max(batch.rollout_mask_sums[position], 1.0) * num_rollouts
            )
    per_row = Ragged.constant_rows(denominators, [mask.numel() for mask in masks])
    return Ragged(torch.cat(list(masks)) / per_row.values, per_row.lengths).rows()


def _plain_fp32(row: Tensor) -> Tensor:
    """The row itself where it is fp32 without gradient: most are, and a new tensor costs more."""
    if row.dtype == torch.float32 and not row.requires_grad:
        return row
    return row.detach().float()


def mean_metrics(batch: RolloutBatch, data: RolloutData, sum_over_dp: SumOverDp) -> Metrics:
    """Means over the round on all ranks: tokens within an execution, then executions; else samples.

    One collective. Its shape depends only on which columns exist, so all ranks agree on it, also
    one whose samples lack an optional number.
    """
    executions = float(sum(plan.num_rollouts for plan in batch.steps))
    names = [name for name in _TOKEN_METRICS if name in data]
    # Every rank knows the number of executions: it must not be added up.
    sums = _per_execution_sums([data[name] for name in names], data["loss_masks"], batch)
    pairs = [(value, 0.0) for value in sums]
    num_token_metrics = len(names)
    is_real = [index != FILLER_INDEX for index in batch.sample_indices]
    for name in (*_SAMPLE_METRICS, *batch.extras):
        values = [v for v, real in zip(data[name], is_real, strict=True) if real]
        numbers = [float(v) for v in values if isinstance(v, int | float)]
        names.append(name)
        pairs.append((sum(numbers), float(len(numbers))))
    totals = sum_over_dp(torch.tensor(pairs, dtype=torch.float64))
    metrics: Metrics = {}
    for row, name in enumerate(names):
        count = executions if row < num_token_metrics else float(totals[row, 1])
        if count:
            metrics[name] = float(totals[row, 0]) / count
    return metrics


def _per_execution_sums(
    columns: Sequence[Sequence[Tensor]], masks: Sequence[Tensor], batch: RolloutBatch
) -> list[float]:
    """Of each column: the sum over samples of (sum of unmasked values / trainable tokens of its
    execution), float64."""
    if not masks:
        return [0.0] * len(columns)
    totals = [max(mask_sum, 1.0) for mask_sum in batch.rollout_mask_sums]
    lengths = [mask.numel() for mask in masks]
    per_row = Ragged.constant_rows(totals, lengths, torch.float64).values
    mask = torch.cat(list(masks)).double()
    trains = mask != 0
    sums: dict[int, float] = {}
    for rows in columns:
        if id(rows) not in sums:  # returns may be the very list of the advantages
            values = torch.cat(list(rows)).double()
            # A masked token may hold anything, NaN too.
            kept = torch.where(trains, values * mask, 0.0)
            sums[id(rows)] = float((kept / per_row).sum())
    return [sums[id(rows)] for rows in columns]
