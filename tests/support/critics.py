"""A critic in transformers and torch, and batches of values and returns for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support.megatron_runs import hf_model, loss_columns
from torch import Tensor

from slime.data.batch import RolloutBatch
from slime.training.interface import TrainStep

CLIP = 0.2


def head_weight(hidden_size: int = 64) -> Tensor:
    """[1, H], the same each time; a critic's own starts at zero, which would hide mistakes."""
    generator = torch.Generator().manual_seed(11)
    return 0.2 * torch.randn(1, hidden_size, generator=generator)


def set_head(trainer: Any, weight: Tensor) -> None:
    """Give a critic this head, and the optimizer the same."""
    from slime.backends.megatron.passes.critic import ValueHead

    for chunk in trainer._bare:
        head = getattr(chunk, "output_layer", None)
        if isinstance(head, ValueHead):
            head.weight.data.copy_(weight)
    trainer._optimizer.reload_model_params()


def critic_step(batch: RolloutBatch) -> TrainStep:
    """The batch's only step with columns for `value_loss`, some values beyond the clip."""
    masks = batch.loss_masks.rows()
    columns = loss_columns(batch)
    columns["returns"] = [
        _numbers(len(m), i, 7) for i, m in zip(batch.rollout_ids, masks, strict=True)
    ]
    columns["old_values"] = [
        0.5 * _numbers(len(m), i, 3) for i, m in zip(batch.rollout_ids, masks, strict=True)
    ]
    return TrainStep(batch=batch, plan=batch.steps[0], columns=columns)


def _numbers(count: int, sample: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(100 * seed + sample))


def hf_values(model: Any, head: Tensor, batch: RolloutBatch) -> list[Tensor]:
    """[R] per sample: the head on the last hidden state where each response token is predicted."""
    rows: list[Tensor] = []
    for tokens, length in zip(batch.tokens.rows(), batch.response_lengths, strict=True):
        hidden = model.model(tokens[None]).last_hidden_state[0]
        rows.append((hidden[-length - 1 : -1] @ head.t()).squeeze(1))
    return rows


@dataclass(frozen=True)
class CriticReference:
    """transformers with a linear head, torch's AdamW, one process.

    Attributes:
        values: [R] per sample of the probe, before the first step and after the last.
        losses, grad_norms, clipfracs: of each step.
        head: [1, H] after the last step.
    """

    values: tuple[list[Tensor], list[Tensor]]
    losses: list[float]
    grad_norms: list[float]
    clipfracs: list[float]
    head: Tensor


def critic_reference(
    folder: str, batches: Sequence[RolloutBatch], probe: RolloutBatch
) -> CriticReference:
    """One step per batch with the optimizer settings of `trainer_config`."""
    model, head = hf_model(folder), head_weight().requires_grad_()
    backbone = list(model.model.parameters())
    matrices = [p for p in backbone if p.dim() > 1]
    vectors = [p for p in backbone if p.dim() <= 1]
    groups: Any = [
        {"params": [*matrices, head], "weight_decay": 0.01},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-5)
    losses: list[float] = []
    norms: list[float] = []
    clipfracs: list[float] = []
    with torch.no_grad():
        before = hf_values(model, head, probe)
    for batch in batches:
        optimizer.zero_grad()
        columns = {n: torch.cat(rows) for n, rows in critic_step(batch).columns.items()}
        values, old = torch.cat(hf_values(model, head, batch)), columns["old_values"]
        held = torch.where((values - old).abs() > CLIP, old + CLIP * (values - old).sign(), values)
        squares = torch.stack([values - columns["returns"], held - columns["returns"]]).square()
        loss = (squares.amax(0) * columns["weight"]).sum()
        loss.backward()
        parameters = [*model.model.parameters(), head]
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        losses.append(float(loss.detach()))
        is_clipped = ((values - old).abs() > CLIP).float()
        clipfracs.append(float((is_clipped * columns["weight"]).sum()))
    with torch.no_grad():
        after = hf_values(model, head, probe)
    return CriticReference((before, after), losses, norms, clipfracs, head.detach())
