"""Trainer: what an update needs of a training backend. Declared here, implemented in `slime.backends`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from torch import Tensor

from slime.data.batch import RolloutBatch, StepPlan

Metrics = dict[str, float]


class ModelTag(StrEnum):
    """Which weights a forward pass uses."""

    ACTOR = "actor"
    REF = "ref"
    OLD_ACTOR = "old_actor"
    TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Sizes of the parallel groups and this rank's place in each; known after the process groups exist."""

    world_size: int = 1
    rank: int = 0
    dp_size: int = 1
    dp_rank: int = 0
    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    cp_size: int = 1
    cp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0


@dataclass(frozen=True, kw_only=True)
class WholeSamples:
    """The samples of a micro-batch in one piece, for a user's function; N counts all their response
    tokens, also those that other context-parallel ranks own.

    Attributes:
        total_lengths, response_lengths: S and R of each sample.
        columns: [R] rows per sample of `TrainStep.columns`, on the device of the outputs.
        owned: [T] int64, which of the N tokens this rank owns; None = all.
        join: [T] of this rank -> [N], the sum over context-parallel ranks; no gradient.
        num_rollouts, num_tokens: of the whole optimizer step, over all ranks.
    """

    total_lengths: list[int]
    response_lengths: list[int]
    columns: Mapping[str, list[Tensor]]
    owned: Tensor | None
    join: Callable[[Tensor], Tensor]
    num_rollouts: int
    num_tokens: float


@dataclass(frozen=True, kw_only=True)
class Logits:
    """What only a loss of the user's own pays for: the logits of every token of a pack.

    Attributes:
        values: [1, S, V / tp] in the model's dtype, of this rank's tokens and part of the
            vocabulary; carries the gradient.
        batch: what goes with them under documented names (`tokens`, `packed_seq_params`, ...).
    """

    values: Tensor
    batch: Mapping[str, Any]


@dataclass(frozen=True)
class TokenView:
    """This rank's response tokens of one micro-batch, as a loss sees them.

    T counts the response tokens (of all samples in the micro-batch, masked ones included) that
    this rank owns under context parallelism; prompt and padding tokens never appear.

    Attributes:
        log_probs: [T] fp32, natural log, temperature applied; carries the gradient. NaN where
            `values` or `logits` are there instead.
        entropy: [T] fp32 of the same distribution; carries the gradient; None unless
            `TrainStep.needs_entropy`.
        columns: [T] fp32 slices of `TrainStep.columns`, no gradient.
        segments: [T] int64, position of the token's sample in the micro-batch, 0 .. num_segments -
            1.
        num_segments: samples in the micro-batch.
        segment_sum: [T] -> [num_segments], the sum over the *whole* response of each sample
            (summed over context- parallel ranks); differentiable.
        values: [T] fp32, of a critic; carries the gradient.
        logits: where `TrainStep.needs_logits`.
        samples: the same samples whole, made when called; None where a trainer does not offer them.
    """

    log_probs: Tensor
    entropy: Tensor | None
    columns: Mapping[str, Tensor]
    segments: Tensor
    num_segments: int
    segment_sum: Callable[[Tensor], Tensor]
    values: Tensor | None = None
    logits: Logits | None = None
    samples: Callable[[], WholeSamples] | None = None


@dataclass(frozen=True)
class LossTerms:
    """What a loss returns for one micro-batch on one rank.

    Attributes:
        loss: scalar with gradient. The optimizer step's loss is the *sum* of these over
            micro-batches and over data- and context-parallel ranks: the loss has already been
            divided by the whole step's denominator.
        metrics: scalars without gradient, summed in the same way.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


LossFn = Callable[[TokenView], LossTerms]


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """One optimizer step of this data-parallel rank.

    Attributes:
        batch: this rank's samples.
        plan: which of them, in which micro-batches.
        columns: name -> one [R] fp32 tensor per sample of `batch` (advantages, old_log_probs,
            loss_mask, weight, ...); the backend slices each to `TokenView.columns`.
        needs_entropy: compute `TokenView.entropy`.
        needs_logits: give `TokenView.logits`, and neither log-probs nor entropy.
        step_id: number of the step within the rollout.
    """

    batch: RolloutBatch
    plan: StepPlan
    columns: Mapping[str, list[Tensor]]
    needs_entropy: bool = False
    needs_logits: bool = False
    step_id: int = 0


class Trainer(Protocol):
    """One rank of one model. Every method is collective: all ranks call it in the same order."""

    layout: ParallelLayout

    def load(self) -> int:
        """Load weights (and optimizer state when resuming); the number of the first rollout to run."""
        ...

    def log_probs(self, batch: RolloutBatch, model: ModelTag) -> list[Tensor]:
        """Log-probs of the response tokens, a whole [R] fp32 CPU tensor per sample, on every rank.

        Temperature (`rollout_temperature`) is applied. Micro-batches follow `batch.steps`.
        """
        ...

    def values(self, batch: RolloutBatch) -> list[Tensor]:
        """The critic's values, a whole [R] fp32 CPU tensor per sample, on every rank.

        Entry i is the value of the state in which response token i is chosen: it stands where that
        token's log-prob does. Only a trainer of role "critic" has them.
        """
        ...

    def train_step(self, step: TrainStep, loss_fn: LossFn) -> Metrics:
        """Forward, backward, reduce, optimizer step.

        Returns:
            The loss metrics summed over micro-batches and data/context-parallel ranks, the same on
            every rank, plus `loss`, `grad_norm` and `lr-pg_{i}`.
        """
        ...

    def sum_over_dp(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over the data-parallel ranks."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of every parameter, in any order; every rank must exhaust it."""
        ...

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint: weights, and optimizer, scheduler and RNG state unless told not to."""
        ...

    def save_hf(self, path: str) -> None:
        """Write a Hugging Face folder that `AutoModelForCausalLM` loads."""
        ...

    def sleep(self) -> None:
        """Give GPU memory back until `wake_up`."""
        ...

    def wake_up(self) -> None:
        """Take GPU memory again, with the state from before `sleep`."""
        ...
