"""transformers with its choice of experts recorded or forced, and routers that have moved."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.megatron_runs import hf_model, policy_gradient_loss, whole_view
from torch import Tensor

from slime.data.batch import RolloutBatch
from slime.training.interface import LossTerms, TokenView

NUM_EXPERTS, TOP_K, NUM_LAYERS = 4, 2, 4


@contextlib.contextmanager
def choices(forced: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """The experts that transformers' routers choose in the block, [S, K] for each call.

    Args:
        forced: taken instead, call by call.
    """
    made: list[Tensor] = []
    topk, queue = torch.topk, iter(forced or [])

    def chosen(scores: Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        if scores.shape[-1] != NUM_EXPERTS or k != TOP_K:  # a choice of groups
            return topk(scores, k, *args, **kwargs)
        values, experts = topk(scores, k, *args, **kwargs)
        if forced is not None:
            experts = next(queue)
            values = scores.gather(-1, experts)
        made.append(experts)
        return values, experts

    torch.topk = chosen
    try:
        yield made
    finally:
        torch.topk = topk


def noise(layer: int, shape: torch.Size) -> Tensor:
    """How far the router of a layer moves: far enough that most tokens choose otherwise."""
    generator = torch.Generator().manual_seed(1000 + layer)
    return 2.0 * torch.randn(shape, generator=generator) * shape[1] ** -0.5


@torch.no_grad()
def move_routers(named: Any) -> None:
    """Add `noise` to the routers among (name, weight) of either naming."""
    moved = 0
    for name, weight in named:
        found = re.search(r"layers\.(\d+)\.mlp\.(router|gate)\.weight$", name)
        if found:
            weight.add_(noise(int(found[1]), weight.shape).to(weight.device))
            moved += 1
    assert moved, "no router found"


def move_trainers_routers(trainer: Any) -> None:
    """`move_routers` of a MegatronTrainer."""
    from slime.backends.megatron.state.named_weights import global_weights

    move_routers(global_weights(trainer._bare))


@dataclass(frozen=True)
class RoutingReference:
    """transformers after its routers moved.

    Attributes:
        experts: int32 [S - 1, layers, K] of each sample, chosen before they moved.
        log_probs: [R] of each sample, with those experts.
        free_log_probs: with the experts that the moved routers choose.
        grad_norm: of `policy_gradient_loss` with those experts.
    """

    experts: list[np.ndarray[Any, np.dtype[np.int32]]]
    log_probs: list[Tensor]
    free_log_probs: list[Tensor]
    grad_norm: float


def routing_reference(folder: str | Path, batch: RolloutBatch) -> RoutingReference:
    """The reference of a batch."""
    model = hf_model(folder)
    with torch.no_grad(), choices() as made:
        whole_view(model, batch)
    move_routers(model.named_parameters())
    lengths = batch.response_lengths
    with torch.no_grad():
        free = list(whole_view(model, batch).log_probs.split(lengths))
    with choices(made):
        view = whole_view(model, batch)
        policy_gradient_loss(view).loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return RoutingReference(
        _by_sample(made, len(batch)),
        list(view.log_probs.detach().split(lengths)),
        free,
        float(norm),
    )


def _by_sample(made: list[Tensor], num_samples: int) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Calls come sample by sample and layer by layer; dense layers stand first and hold zeros."""
    per_sample = len(made) // num_samples
    arrays: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    for i in range(num_samples):
        layers = made[i * per_sample : (i + 1) * per_sample]
        dense = [torch.zeros_like(layers[0])] * (NUM_LAYERS - per_sample)
        arrays.append(torch.stack([*dense, *layers], 1)[:-1].to(torch.int32).numpy())
    return arrays


def with_experts(batch: RolloutBatch, experts: list[Any]) -> RolloutBatch:
    """The batch with what an engine recorded, as batching makes it."""
    rows = tuple(None if e is None else torch.from_numpy(e.astype(np.int16)) for e in experts)
    return replace(batch, rollout_routed_experts=rows)


class SeenLogProbs:
    """`policy_gradient_loss` that keeps the log-probs it sees, micro-batch by micro-batch."""

    def __init__(self) -> None:
        self.log_probs: list[Tensor] = []

    def __call__(self, view: TokenView) -> LossTerms:
        self.log_probs.append(view.log_probs.detach().cpu().clone())
        return policy_gradient_loss(view)

    def by_sample(self, batch: RolloutBatch) -> list[Tensor]:
        """[R] of each sample of the batch's only step."""
        rows: list[Tensor] = [torch.empty(0)] * len(batch)
        for samples, seen in zip(batch.steps[0].micro_batches, self.log_probs, strict=True):
            pieces = seen.split([batch.response_lengths[i] for i in samples])
            for i, row in zip(samples, pieces, strict=True):
                rows[i] = row
        return rows
