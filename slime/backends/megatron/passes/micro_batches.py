"""Passes over the micro-batches of a step, through Megatron's own schedule."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from slime.backends.megatron.packs.pack import MicroBatch, pack_micro_batch
from slime.backends.megatron.passes.critic import forward_values
from slime.backends.megatron.passes.forward import (
    Forward,
    LogProbOptions,
    ResponseOutputs,
    forward_logits,
    forward_responses,
)
from slime.backends.megatron.passes.routing_replay import Routing, RoutingReplay
from slime.backends.megatron.passes.views import add_up, join_over_context, token_view
from slime.backends.megatron.process.parallel import (
    cp_group,
    dp_cp_group,
    from_last_stage,
    is_last_stage,
    object_from_last_stage,
)
from slime.backends.megatron.process.stock import without_warnings
from slime.data.batch import RolloutBatch
from slime.training.interface import LossFn, Metrics, TrainStep


class Passes:
    """Forward and backward of one rank's model.

    Args:
        model: its chunks: one, or one per virtual pipeline stage.
        pad_multiple: packs are padded to a multiple of this many tokens.
        is_critic: the model gives values instead of log-probs.
        keeps_all_rows: compute the last layer for every token, as a loss of logits needs it.
        has_varlen: attention has a kernel for packs.
        replay: of the choices of experts; None = every pass makes its own.
    """

    def __init__(
        self,
        model: list[DistributedDataParallel],
        options: LogProbOptions,
        *,
        device: torch.device,
        pad_multiple: int,
        is_critic: bool = False,
        keeps_all_rows: bool = False,
        has_varlen: bool = False,
        replay: RoutingReplay | None = None,
    ) -> None:
        self._model = model
        self._options = options
        self._device = device
        self._pad_multiple = pad_multiple
        self._is_critic = is_critic
        self._keeps_all_rows = keeps_all_rows
        self._has_varlen = has_varlen
        self._replay = replay

    def log_probs(self, batch: RolloutBatch, *, is_policy: bool = True) -> list[Tensor]:
        """[R] on the CPU for each sample of the batch's micro-batches; zeros for one in none.

        Args:
            is_policy: with the weights that are trained: their choice of experts is recorded, or
                is the engine's, where routing is replayed.
        """
        forward = partial(forward_responses, options=self._options, needs_entropy=False)
        routing = Routing.OWN
        if self._replay is not None and is_policy:
            routing = Routing.REPLAY if self._replay.from_engine else Routing.RECORD
        return self._rows(batch, forward, "log_probs", routing)

    def values(self, batch: RolloutBatch) -> list[Tensor]:
        """[R] on the CPU for each sample of the batch's micro-batches; zeros for one in none."""
        return self._rows(batch, forward_values, "values")

    def _rows(
        self, batch: RolloutBatch, forward: Forward, name: str, routing: Routing = Routing.OWN
    ) -> list[Tensor]:
        micro_batches = [samples for plan in batch.steps for samples in plan.micro_batches]
        for chunk in self._model:
            chunk.eval()
        finish = partial(_response_rows, name=name)
        with torch.no_grad():
            outputs = self._run(
                batch, micro_batches, forward, finish, trains=False, routing=routing
            )
        order = [i for samples in micro_batches for i in samples]
        lengths = [batch.response_lengths[i] for i in order]
        flat = torch.cat(outputs) if is_last_stage() else torch.empty(sum(lengths))
        flat = from_last_stage(flat.to(self._device, torch.float32))
        rows: list[Tensor] = [torch.zeros(length) for length in batch.response_lengths]
        for i, row in zip(order, flat.cpu().split(lengths), strict=True):
            rows[i] = row
        return rows

    def accumulate_gradients(self, step: TrainStep, loss_fn: LossFn) -> Metrics:
        """Add the gradients of the step's loss, reduced over ranks, to the gradient buffers.

        Returns:
            `loss` and the metrics of the loss, summed over micro-batches and ranks.
        """
        for chunk in self._model:
            chunk.train()
        terms = self._run(
            step.batch,
            step.plan.micro_batches,
            self._training_forward(step),
            partial(_loss, loss_fn=loss_fn, step=step),
            trains=True,
            routing=Routing.REPLAY,
        )
        return object_from_last_stage(_sums(terms) if is_last_stage() else None)

    def _training_forward(self, step: TrainStep) -> Forward:
        if self._is_critic:
            return forward_values
        if step.needs_logits:
            return partial(forward_logits, options=self._options)
        return partial(forward_responses, options=self._options, needs_entropy=step.needs_entropy)

    @without_warnings()
    def _run(
        self,
        batch: RolloutBatch,
        micro_batches: Sequence[tuple[int, ...]],
        forward: Forward,
        finish: Callable[..., Any],
        *,
        trains: bool,
        routing: Routing,
    ) -> list[Any]:
        """What `finish` made of each micro-batch."""

        def step(packs: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Any, Any]:
            micro = next(packs)
            with self._forward_routing(model, micro, batch):
                outputs = forward(model, micro)
            return outputs, partial(finish, micro=micro)

        packs = [self._packs(batch, micro_batches) for _ in self._model]
        chunks: list[Any] = list(self._model)
        with self._pass_routing(batch, routing, trains=trains):
            return get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=packs if len(packs) > 1 else packs[0],
                model=chunks,
                num_microbatches=len(micro_batches),
                seq_length=batch.tokens.values.numel(),  # unused: lengths vary
                micro_batch_size=1,
                forward_only=not trains,
                collect_non_loss_data=not trains,
            )

    def _pass_routing(
        self, batch: RolloutBatch, routing: Routing, *, trains: bool
    ) -> contextlib.AbstractContextManager[None]:
        if self._replay is None:
            return contextlib.nullcontext()
        if routing is Routing.REPLAY:
            self._replay.check(batch)
        return self._replay.during(routing, trains=trains)

    def _forward_routing(
        self, model: torch.nn.Module, micro: MicroBatch, batch: RolloutBatch
    ) -> contextlib.AbstractContextManager[None]:
        if self._replay is None:
            return contextlib.nullcontext()
        return self._replay.forward(model, micro, batch)

    def _packs(
        self, batch: RolloutBatch, micro_batches: Sequence[tuple[int, ...]]
    ) -> Iterator[MicroBatch]:
        for samples in micro_batches:
            yield pack_micro_batch(
                batch,
                samples,
                device=self._device,
                multiple=self._pad_multiple,
                context=cp_group(),
                keeps_all_rows=self._keeps_all_rows,
                has_varlen=self._has_varlen,
            )


def _response_rows(
    outputs: ResponseOutputs, *, micro: MicroBatch, name: str, non_loss_data: bool
) -> Tensor:
    """[N] of all response tokens of the micro-batch, on each rank that shares its sequences."""
    return join_over_context(getattr(outputs, name), micro)


def _sums(terms: Sequence[Mapping[str, Tensor]]) -> Metrics:
    """The terms of all micro-batches and data-parallel ranks, added up."""
    names = sorted(terms[0])
    sums = torch.stack([torch.stack([term[name].float() for name in names]) for term in terms])
    total = sums.sum(0)
    add_up(total, dp_cp_group())
    return dict(zip(names, total.tolist(), strict=True))


def _loss(
    outputs: ResponseOutputs, *, micro: MicroBatch, loss_fn: LossFn, step: TrainStep
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, number of tokens, metrics) as Megatron's schedules take them; they divide nothing."""
    terms = loss_fn(token_view(outputs, micro, step))
    metrics = {name: value.detach() for name, value in terms.metrics.items()}
    no_tokens = torch.zeros((), dtype=torch.int, device=terms.loss.device)
    return terms.loss, no_tokens, metrics | {"loss": terms.loss.detach()}


def sum_gradients(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Reduce gradients over ranks without Megatron's division by tokens: the losses had theirs."""
    finalize_model_grads(model, None, **kwargs)
