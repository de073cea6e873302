"""Passes over the micro-batches of a step, through Megatron's own schedule."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from slime.backends.megatron.forward import (
    LogProbOptions,
    ResponseOutputs,
    forward_responses,
    token_view,
)
from slime.backends.megatron.pack import MicroBatch, pack_micro_batch
from slime.backends.megatron.parallel import dp_cp_group
from slime.backends.megatron.stock import without_warnings
from slime.data.batch import RolloutBatch
from slime.training.interface import LossFn, Metrics, TrainStep


class Passes:
    """Forward and backward of one rank's model.

    Args:
        pad_multiple: packs are padded to a multiple of this many tokens.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        options: LogProbOptions,
        *,
        device: torch.device,
        pad_multiple: int,
    ) -> None:
        self._model = model
        self._options = options
        self._device = device
        self._pad_multiple = pad_multiple

    def log_probs(self, batch: RolloutBatch) -> list[Tensor]:
        """[R] on the CPU for each sample of the batch's micro-batches; zeros for one in none."""
        micro_batches = [samples for plan in batch.steps for samples in plan.micro_batches]
        self._model.eval()
        with torch.no_grad():
            outputs = self._run(batch, micro_batches, _log_probs, needs_entropy=False, trains=False)
        rows: list[Tensor] = [torch.zeros(length) for length in batch.response_lengths]
        for samples, values in zip(micro_batches, outputs, strict=True):
            lengths = [batch.response_lengths[i] for i in samples]
            for i, row in zip(samples, values.cpu().split(lengths), strict=True):
                rows[i] = row
        return rows

    def accumulate_gradients(self, step: TrainStep, loss_fn: LossFn) -> Metrics:
        """Add the gradients of the step's loss, reduced over ranks, to the gradient buffers.

        Returns:
            `loss` and the metrics of the loss, summed over micro-batches and ranks.
        """
        self._model.train()
        terms = self._run(
            step.batch,
            step.plan.micro_batches,
            partial(_loss, loss_fn=loss_fn, step=step),
            needs_entropy=step.needs_entropy,
            trains=True,
        )
        names = sorted(terms[0])
        sums = torch.stack([torch.stack([term[name].float() for name in names]) for term in terms])
        total = sums.sum(0)
        add_up(total, dp_cp_group())
        return dict(zip(names, total.tolist(), strict=True))

    @without_warnings()
    def _run(
        self,
        batch: RolloutBatch,
        micro_batches: Sequence[tuple[int, ...]],
        finish: Callable[..., Any],
        *,
        needs_entropy: bool,
        trains: bool,
    ) -> list[Any]:
        """What `finish` made of each micro-batch."""

        def step(packs: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Any, Any]:
            micro = next(packs)
            outputs = forward_responses(model, micro, self._options, needs_entropy=needs_entropy)
            return outputs, partial(finish, micro=micro)

        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=self._packs(batch, micro_batches),
            model=[self._model],
            num_microbatches=len(micro_batches),
            seq_length=batch.tokens.values.numel(),  # unused: lengths vary
            micro_batch_size=1,
            forward_only=not trains,
            collect_non_loss_data=not trains,
        )

    def _packs(
        self, batch: RolloutBatch, micro_batches: Sequence[tuple[int, ...]]
    ) -> Iterator[MicroBatch]:
        for samples in micro_batches:
            yield pack_micro_batch(batch, samples, device=self._device, multiple=self._pad_multiple)


def _log_probs(outputs: ResponseOutputs, *, micro: MicroBatch, non_loss_data: bool) -> Tensor:
    return outputs.log_probs


def _loss(
    outputs: ResponseOutputs, *, micro: MicroBatch, loss_fn: LossFn, step: TrainStep
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, number of tokens, metrics) as Megatron's schedules take them; they divide nothing."""
    terms = loss_fn(token_view(outputs, micro, step.columns))
    metrics = {name: value.detach() for name, value in terms.metrics.items()}
    no_tokens = torch.zeros((), dtype=torch.int, device=terms.loss.device)
    return terms.loss, no_tokens, metrics | {"loss": terms.loss.detach()}


def add_up(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Make `tensor` the sum over the ranks of `group`; alone, a rank waits for no other thread."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)


def sum_gradients(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Reduce gradients over ranks without Megatron's division by tokens: the losses had theirs."""
    finalize_model_grads(model, None, **kwargs)
