"""What a loss sees of a micro-batch: columns of this rank's tokens, and whole samples on demand."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.backends.megatron.packs.context import sum_over_ranks
from slime.backends.megatron.packs.pack import MicroBatch
from slime.backends.megatron.passes.forward import ResponseOutputs
from slime.backends.megatron.process.parallel import cp_group
from slime.training.interface import Logits, TokenView, TrainStep, WholeSamples

# Column of a loss -> its documented name for a user's loss.
_DOCUMENTED = {"old_log_probs": "log_probs"}


def token_view(outputs: ResponseOutputs, micro: MicroBatch, step: TrainStep) -> TokenView:
    """What a loss sees of this micro-batch of a step."""
    device = outputs.device
    num_segments, context = len(micro.samples), cp_group()

    def segment_sum(values: Tensor) -> Tensor:
        sums = values.new_zeros(num_segments).index_add(0, micro.segments, values)
        return sum_over_ranks(sums, context) if context.size() > 1 else sums

    def column(rows: list[Tensor]) -> Tensor:
        whole = torch.cat([rows[i] for i in micro.samples]).to(device, torch.float32)
        return whole if micro.owned is None else whole.index_select(0, micro.owned)

    columns = {name: column(rows) for name, rows in step.columns.items()}
    logits = None
    if outputs.logits is not None:
        logits = Logits(values=outputs.logits, batch=_documented_batch(columns, micro, step))
    return TokenView(
        log_probs=outputs.log_probs,
        entropy=outputs.entropy,
        columns=columns,
        segments=micro.segments,
        num_segments=num_segments,
        segment_sum=segment_sum,
        values=outputs.values,
        logits=logits,
        samples=functools.partial(_whole_samples, micro, step, device),
    )


def add_up(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Make `tensor` the sum over the ranks of `group`; alone, a rank waits for no other thread."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)


def join_over_context(values: Tensor, micro: MicroBatch) -> Tensor:
    """[N] of all response tokens of a micro-batch from the [T] that each rank of CP owns."""
    if micro.owned is None:
        return values
    whole = values.new_zeros(sum(micro.response_lengths))
    whole.index_copy_(0, micro.owned, values)
    add_up(whole, cp_group())
    return whole


def _whole_samples(micro: MicroBatch, step: TrainStep, device: torch.device) -> WholeSamples:
    def rows(column: list[Tensor]) -> list[Tensor]:
        return [column[i].to(device, torch.float32) for i in micro.samples]

    return WholeSamples(
        total_lengths=_total_lengths(micro, step),
        response_lengths=list(micro.response_lengths),
        columns={name: rows(column) for name, column in step.columns.items()},
        owned=micro.owned,
        join=functools.partial(join_over_context, micro=micro),
        num_rollouts=step.plan.num_rollouts,
        num_tokens=step.plan.num_tokens,
    )


def _total_lengths(micro: MicroBatch, step: TrainStep) -> list[int]:
    return [step.batch.tokens.lengths[i] for i in micro.samples]


def _documented_batch(
    columns: dict[str, Tensor], micro: MicroBatch, step: TrainStep
) -> dict[str, Any]:
    """What goes with logits. Under context parallelism per-token lists are this rank's tokens;
    `unconcat_tokens` and `loss_masks` are whole."""
    device, batch = micro.tokens.device, step.batch
    tokens = batch.tokens.rows()
    counts = torch.bincount(micro.segments, minlength=len(micro.samples)).tolist()
    masks = [step.columns["loss_mask"][i].to(device) for i in micro.samples]
    full_masks = torch.zeros(micro.tokens.shape, device=device)
    full_masks[0, micro.predict] = columns["loss_mask"]
    per_token = {
        _DOCUMENTED.get(name, name): list(values.split(counts))
        for name, values in columns.items()
        if name != "loss_mask"
    }
    return {
        **per_token,
        "tokens": micro.tokens,
        "unconcat_tokens": [tokens[i].to(device) for i in micro.samples],
        "packed_seq_params": micro.packed,
        "total_lengths": _total_lengths(micro, step),
        "response_lengths": list(micro.response_lengths),
        "loss_masks": masks,
        "full_loss_masks": full_masks,
        "rollout_mask_sums": [batch.rollout_mask_sums[i] for i in micro.samples],
    }
