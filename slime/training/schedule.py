"""Which sample goes to which optimizer step, data-parallel rank and micro-batch. Pure Python.

What always holds (tests/unit/training/test_schedule.py):
- an execution's samples are all in one step; each kept sample is in exactly one micro-batch;
- every rank has the same number of micro-batches in a step, a multiple of `micro_batch_multiple`;
- with a token cap no micro-batch of two or more samples exceeds it; without, none has more than
  `micro_batch_size` samples.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from slime.config.config import Config
from slime.errors import ConfigError
from slime.training.packing import first_fit, karmarkar_karp, split_largest

MicroBatch = tuple[int, ...]

# Work per token that does not depend on the length, in units of the hidden size: 24 h^2 FLOPs per
# token and layer (attention projections and a 4h MLP) against 2 h L for causal attention.
_LINEAR_FLOPS_PER_HIDDEN = 12
_DEFAULT_HIDDEN = 1024


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How to cut.

    Attributes:
        global_batch_size: executions per optimizer step.
        dp_size: data-parallel ranks.
        micro_batch_size: samples per micro-batch when there is no cap.
        token_cap: most tokens of a micro-batch over its context-parallel ranks; None = no cap.
        balance_ranks: spread micro-batches over ranks by estimated FLOPs, not in turn.
        balance_bins: form the micro-batches by estimated FLOPs as well (within the cap).
        micro_batch_multiple: of the number of micro-batches per rank; for interleaved pipelines.
        hidden_size: of the model, for the FLOPs estimate.
    """

    global_batch_size: int
    dp_size: int = 1
    micro_batch_size: int = 1
    token_cap: int | None = None
    balance_ranks: bool = False
    balance_bins: bool = False
    micro_batch_multiple: int = 1
    hidden_size: int = _DEFAULT_HIDDEN


def schedule_options(
    config: Config, *, dp_size: int, cp_size: int = 1, micro_batch_multiple: int = 1
) -> ScheduleOptions:
    """The options that the flags ask for.

    Raises:
        ConfigError: no batch size, or dynamic batch size without a cap.
    """
    global_batch_size = config.global_batch_size
    if global_batch_size is None:
        prompts = config.rollout_batch_size or 0
        global_batch_size = (
            prompts * config.n_samples_per_prompt // (config.num_steps_per_rollout or 1)
        )
    if global_batch_size < 1:
        raise ConfigError("give --global-batch-size, or --rollout-batch-size to derive it from")
    cap = None
    if config.use_dynamic_batch_size:
        if config.max_tokens_per_gpu is None:
            raise ConfigError("--use-dynamic-batch-size needs --max-tokens-per-gpu")
        cap = config.max_tokens_per_gpu * cp_size
    return ScheduleOptions(
        global_batch_size=global_batch_size,
        dp_size=dp_size,
        micro_batch_size=config.micro_batch_size,
        token_cap=cap,
        balance_ranks=config.balance_data,
        balance_bins=config.balance_by_flops,
        micro_batch_multiple=micro_batch_multiple,
        hidden_size=config.hidden_size or _DEFAULT_HIDDEN,
    )


@dataclass(frozen=True)
class StepSchedule:
    """One optimizer step: `ranks[r]` are the micro-batches of data-parallel rank r.

    A position is that of a sample in the whole round. A micro-batch may be empty: there were fewer
    samples than micro-batches needed, and the caller has to put a filler there.
    """

    positions: tuple[int, ...]
    ranks: tuple[tuple[MicroBatch, ...], ...]


@dataclass(frozen=True)
class Schedule:
    """The steps of a round, and the positions of samples that no step takes."""

    steps: tuple[StepSchedule, ...]
    dropped: tuple[int, ...]


def plan_steps(
    executions: Sequence[Hashable], lengths: Sequence[int], options: ScheduleOptions
) -> Schedule:
    """The schedule of one round.

    Args:
        executions: execution of each sample, in any order; steps take them in first-seen order.
        lengths: tokens of each sample, prompt included.
        options: see `ScheduleOptions`.

    Raises:
        ConfigError: there are fewer executions than one step takes.
    """
    members: dict[Hashable, list[int]] = {}
    for position, execution in enumerate(executions):
        members.setdefault(execution, []).append(position)
    groups, size = list(members.values()), options.global_batch_size
    num_steps = len(groups) // size
    if num_steps == 0:
        raise ConfigError(
            f"--global-batch-size {size}: the round has only {len(groups)} executions "
            f"({len(lengths)} samples), not enough for one optimizer step; lower it, or generate "
            "more (rollout_batch_size x n_samples_per_prompt, before filters)."
        )
    steps = tuple(
        _plan_step(_flatten(groups[i * size : (i + 1) * size]), lengths, options)
        for i in range(num_steps)
    )
    return Schedule(steps, tuple(_flatten(groups[num_steps * size :])))


def forward_flops(length: int, hidden_size: int) -> float:
    """Forward FLOPs of a sequence, in arbitrary units: a linear and a quadratic part."""
    return length * (_LINEAR_FLOPS_PER_HIDDEN * hidden_size + length)


def _flatten(groups: Sequence[Sequence[int]]) -> list[int]:
    return [position for group in groups for position in group]


def _plan_step(
    positions: list[int], lengths: Sequence[int], options: ScheduleOptions
) -> StepSchedule:
    step_lengths = [lengths[p] for p in positions]
    bins = _pack(step_lengths, options)
    unit = options.dp_size * options.micro_batch_multiple
    wanted = -(-len(bins) // unit) * unit
    bins = split_largest(bins, step_lengths, wanted)
    bins += [[] for _ in range(wanted - len(bins))]
    ranks = tuple(
        tuple(tuple(positions[i] for i in bins[number]) for number in numbers)
        for numbers in _assign(bins, step_lengths, options)
    )
    return StepSchedule(tuple(positions), ranks)


def _pack(lengths: list[int], options: ScheduleOptions) -> list[list[int]]:
    """Bins of positions into `lengths`, as few as the rules allow."""
    cap = options.token_cap
    if cap is None:
        size = options.micro_batch_size
        return [list(range(i, min(i + size, len(lengths)))) for i in range(0, len(lengths), size)]
    fitted = first_fit(lengths, cap)
    if not options.balance_bins:
        return fitted
    flops = [forward_flops(length, options.hidden_size) for length in lengths]
    # Balanced bins may overflow; take the fewest that do not, and first-fit if none up to its
    # count.
    for num_bins in sorted({-(-sum(lengths) // cap), len(fitted)}):
        bins = [sorted(items) for items in karmarkar_karp(flops, num_bins) if items]
        if all(len(b) == 1 or sum(lengths[i] for i in b) <= cap for b in bins):
            return sorted(bins)
    return fitted


def _assign(bins: list[list[int]], lengths: list[int], options: ScheduleOptions) -> list[list[int]]:
    """For each rank the numbers of its bins, equally many."""
    dp_size = options.dp_size
    if not options.balance_ranks:
        return [list(range(rank, len(bins), dp_size)) for rank in range(dp_size)]
    flops = [sum(forward_flops(lengths[i], options.hidden_size) for i in b) for b in bins]
    return [sorted(numbers) for numbers in karmarkar_karp(flops, dp_size, equal_count=True)]
