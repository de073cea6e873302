"""Losses, reducers and corrections as a user would write them, for the flags that take paths."""

from typing import Any

import torch
from torch import Tensor

SEEN: dict[str, Any] = {}


def nll(args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any) -> Any:
    """The SFT loss from logits, for any number of context-parallel ranks but one tensor-parallel."""
    SEEN.update(args=args, batch=batch, logits=logits, calls=SEEN.get("calls", 0) + 1)
    table = logits[0].float().log_softmax(-1)
    rows = torch.cat([table.new_zeros(0), *response_log_probs(table, batch)])
    loss = -sum_of_sample_mean(rows)
    return loss, {"nll": loss.detach(), "one": sum_of_sample_mean(torch.ones_like(rows))}


def response_log_probs(table: Tensor, batch: dict[str, Any]) -> list[Tensor]:
    """[R] per sample from [S, V] of the packed samples; one context-parallel rank."""
    rows: list[Tensor] = []
    end = 0
    lengths = zip(batch["unconcat_tokens"], batch["response_lengths"], strict=True)
    for tokens, response in lengths:
        end += len(tokens)
        part = table[end - response - 1 : end - 1]
        rows.append(part.gather(1, tokens[len(tokens) - response :, None]).squeeze(1))
    return rows


def masked_nll(args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any) -> Any:
    """The sum of log(sum exp) where unmasked tokens are predicted: needs no other rank's tokens."""
    sizes = logits[0].float().logsumexp(-1)
    mask = batch["full_loss_masks"][0]
    return (sizes * mask).sum(), {}


def no_pair(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any) -> Any:
    """Returns too little."""
    return logits.sum()


def constant_divisor(
    total_lengths: list[int],
    response_lengths: list[int],
    loss_masks: list[Tensor],
    calculate_per_token_loss: bool,
) -> Any:
    """Dr. GRPO's: the sum over tokens by a constant."""
    SEEN.update(total_lengths=total_lengths, per_token=calculate_per_token_loss)
    assert [len(mask) for mask in loss_masks] == response_lengths

    def reduce(values: Tensor) -> Tensor:
        pieces = values.split(response_lengths)
        return sum(
            ((piece * mask).sum() / 10.0 for piece, mask in zip(pieces, loss_masks, strict=True)),
            torch.zeros(()),
        )

    return reduce


def drop_far_tokens(
    *,
    args: Any,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    total_lengths: list[int],
    response_lengths: list[int],
) -> Any:
    """Weight by a truncated ratio, and drop tokens whose ratio is below a bound."""
    assert [len(row) for row in train_log_probs] == response_lengths
    ratios = [
        (ours - theirs).exp()
        for ours, theirs in zip(train_log_probs, rollout_log_probs, strict=True)
    ]
    masks = [mask * (ratio > 0.7) for mask, ratio in zip(loss_masks, ratios, strict=True)]
    ratio = torch.cat(ratios)
    return pg_loss * ratio.clamp(max=1.5), masks, {"own_ratio": ratio}


def one_mask_short(*, pg_loss: Tensor, loss_masks: list[Tensor], **_: Any) -> Any:
    """Forgets a sample."""
    return pg_loss, loss_masks[1:], {}


def unchanged(*, pg_loss: Tensor, loss_masks: list[Tensor], **_: Any) -> Any:
    """Corrects nothing."""
    return pg_loss, loss_masks, {}


def mean_of_means(
    total_lengths: list[int],
    response_lengths: list[int],
    loss_masks: list[Tensor],
    calculate_per_token_loss: bool,
) -> Any:
    """The sum over samples of the mean over their tokens, which is the built-in reduction."""

    def reduce(values: Tensor) -> Tensor:
        means = [
            (piece * mask).sum() / mask.sum().clamp(min=1.0)
            for piece, mask in zip(values.split(response_lengths), loss_masks, strict=True)
        ]
        return torch.stack(means).sum()

    return reduce
