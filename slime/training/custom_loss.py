"""Losses and their parts by the user's own functions, called as documented."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils.checkpoint as recomputation
from torch import Tensor

from slime.errors import DataError
from slime.training.interface import LossTerms, TokenView, WholeSamples
from slime.training.masked import masked_sum

# fn(args, batch, logits, sum_of_sample_mean) -> (loss, metrics)
LossFunction = Callable[
    [Any, dict[str, Any], Tensor, Callable[[Tensor], Tensor]], tuple[Tensor, Mapping[str, Any]]
]
# fn(total_lengths, response_lengths, loss_masks, calculate_per_token_loss) -> fn([N]) -> scalar
MakeReducer = Callable[[list[int], list[int], list[Tensor], bool], Callable[[Tensor], Tensor]]
# fn(*, args, pg_loss, ...) -> (pg_loss [N], loss masks [R] per sample, metrics [N] each)
CorrectionFunction = Callable[..., tuple[Tensor, Sequence[Tensor], Mapping[str, Tensor]]]


def custom_loss(
    view: TokenView,
    *,
    function: LossFunction,
    args: Any,
    per_token: bool,
    recomputes: bool = False,
) -> LossTerms:
    """What the function of --custom-loss-function-path says.

    It gets `args`, the documented columns of the micro-batch, the logits [1, S, V / tp] of all its
    tokens and `sum_of_sample_mean`: [T] values of this rank's response tokens -> the sum over
    samples of the mean over trainable tokens (over tokens, with `per_token`). Its loss and metrics
    are then divided by the rollouts (tokens) of the whole optimizer step. Temperature is not
    applied; under tensor and context parallelism the function sees this rank's part alone, and the
    losses of context-parallel ranks are added.

    Args:
        recomputes: call it again in the backward pass instead of keeping what it computed.

    Raises:
        DataError: it returned something else than a scalar with gradient, and metrics.
    """
    assert view.logits is not None, "TrainStep.needs_logits"
    divisor = _divisor(_samples(view), per_token)
    weight = view.columns["weight"]

    def sum_of_sample_mean(values: Tensor) -> Tensor:
        return masked_sum(values.reshape(-1), weight) * divisor

    arguments = args, dict(view.logits.batch), view.logits.values, sum_of_sample_mean
    returned: Any = function(*arguments) if not recomputes else _checkpointed(function, *arguments)
    try:
        loss, metrics = returned
    except (TypeError, ValueError):
        raise DataError(
            "--custom-loss-function-path: the function must return (loss, metrics), found "
            f"{type(returned).__name__}"
        ) from None
    _check_scalar(loss, "--custom-loss-function-path")
    numbers = {name: torch.as_tensor(value) for name, value in metrics.items()}
    return LossTerms(
        cast(Tensor, loss) / divisor,
        {name: value.detach().float() / divisor for name, value in numbers.items()},
    )


def _checkpointed(function: Any, *arguments: Any) -> Any:
    untyped: Any = recomputation
    return untyped.checkpoint(function, *arguments, use_reentrant=False)


@dataclass(frozen=True, kw_only=True)
class OwnReducer:
    """The function of --custom-pg-loss-reducer-function-path.

    Attributes:
        function: makes a reducer of [N] values of all response tokens of a micro-batch. It should
            be linear: under context parallelism each rank has zeros for tokens of others, and the
            results are added.
        per_token: what it is told, and whether the step's tokens or its rollouts divide the result.
    """

    function: MakeReducer
    per_token: bool

    def __call__(self, view: TokenView, values: Tensor, masks: Sequence[Tensor] | None) -> Tensor:
        """The policy loss of the micro-batch from [T] values.

        Args:
            masks: [R] per sample, narrowed by a correction; None: the loss masks.

        Raises:
            DataError: the reducer returned no scalar.
        """
        samples = _samples(view)
        masks = samples.columns["loss_mask"] if masks is None else masks
        lengths = samples.total_lengths, samples.response_lengths
        reduce = self.function(*lengths, list(masks), self.per_token)
        loss = reduce(_spread(values, samples))
        _check_scalar(loss, "--custom-pg-loss-reducer-function-path")
        return loss / _divisor(samples, self.per_token)


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """What a user's correction made of the policy loss.

    Attributes:
        per_token: [T] carries the gradient.
        kept: [T] share of each token's weight that stays, 0 or 1 as a rule.
        masks: [R] per sample, whole.
        metrics: name -> [T].
    """

    per_token: Tensor
    kept: Tensor
    masks: list[Tensor]
    metrics: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class OwnCorrection:
    """The function of --custom-tis-function-path.

    It gets whole samples, also under context parallelism, where `pg_loss` is 0 at tokens of other
    ranks; it may weigh the loss of tokens and drop tokens from the masks.
    """

    function: CorrectionFunction
    args: Any

    def __call__(self, view: TokenView, per_token: Tensor, trainer: Tensor) -> Corrected:
        """The corrected loss.

        Args:
            per_token: [T] policy loss.
            trainer: [T] the trainer's log-probs from before the step.

        Raises:
            DataError: what the function returned does not fit the samples.
        """
        samples = _samples(view)
        lengths = samples.response_lengths
        pg_loss, masks, metrics = self.function(
            args=self.args,
            pg_loss=_spread(per_token, samples),
            train_log_probs=list(torch.split(samples.join(trainer.detach()), lengths)),
            rollout_log_probs=samples.columns["rollout_log_probs"],
            loss_masks=samples.columns["loss_mask"],
            total_lengths=samples.total_lengths,
            response_lengths=lengths,
        )
        masks = [torch.as_tensor(mask) for mask in masks]
        _check_lengths(pg_loss, masks, metrics, lengths)
        old = torch.cat(samples.columns["loss_mask"])
        kept = torch.where(old != 0, torch.cat(masks).to(old) / old, 0.0)
        return Corrected(
            per_token=_own(pg_loss, samples),
            kept=_own(kept, samples),
            masks=masks,
            metrics={name: _own(value, samples) for name, value in metrics.items()},
        )


def _check_lengths(
    pg_loss: Tensor, masks: list[Tensor], metrics: Mapping[str, Tensor], lengths: list[int]
) -> None:
    flag, total = "--custom-tis-function-path", sum(lengths)
    if [mask.numel() for mask in masks] != lengths:
        raise DataError(
            f"{flag}: the function must return one mask [R] per sample with R = {lengths[:4]}..., "
            f"found {[mask.numel() for mask in masks][:4]}..."
        )
    for name, values in {"pg_loss": pg_loss, **metrics}.items():
        if values.numel() != total:
            raise DataError(
                f"{flag}: {name} must have one value per response token, {total} in all; found "
                f"{values.numel()}"
            )


def _samples(view: TokenView) -> WholeSamples:
    assert view.samples is not None, "this trainer has no whole samples"
    return view.samples()


def _divisor(samples: WholeSamples, per_token: bool) -> float:
    return max(samples.num_tokens if per_token else float(samples.num_rollouts), 1.0)


def _spread(values: Tensor, samples: WholeSamples) -> Tensor:
    """[N] from this rank's [T], 0 elsewhere; differentiable."""
    if samples.owned is None:
        return values
    return values.new_zeros(sum(samples.response_lengths)).index_copy(0, samples.owned, values)


def _own(values: Tensor, samples: WholeSamples) -> Tensor:
    """This rank's [T] of [N]."""
    values = values.reshape(-1)
    return values if samples.owned is None else values.index_select(0, samples.owned)


def _check_scalar(loss: object, flag: str) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise DataError(f"{flag}: the loss must be a scalar tensor with gradient, found {loss!r}")
