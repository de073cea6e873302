"""Rewards centred and scaled within the group of samples that answer the same prompt."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from slime.config.config import Config
from slime.data.sample import Sample
from slime.errors import DataError
from slime.training.algorithms.base import load_algorithm

_STD_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class RewardNormalization:
    """What is done to a group's rewards: subtract the mean; divide by the standard deviation."""

    center: bool
    scale: bool


def reward_normalization(config: Config) -> RewardNormalization:
    """What the algorithm and the --disable-* flags ask for."""
    algorithm = load_algorithm(config.advantage_estimator)
    center = algorithm.centers_rewards and not config.disable_rewards_normalization
    scale = algorithm.scales_rewards and not config.disable_grpo_std_normalization
    return RewardNormalization(
        center=center, scale=center and scale and config.n_samples_per_prompt > 1
    )


def post_process_rewards(
    samples: Sequence[Sample], config: Config
) -> tuple[list[float], list[float]]:
    """(raw rewards, rewards after normalisation), one per sample.

    A sample that was removed before anyone judged it (`remove_sample`, reward None) gets 0.0 and
    does not count in its group.

    Raises:
        DataError: a sample has no finite reward, or no `group_index` while rewards are normalised.
    """
    judged = [not (sample.remove_sample and sample.reward is None) for sample in samples]
    raw = [
        _finite_reward(sample, config) if is_judged else 0.0
        for sample, is_judged in zip(samples, judged, strict=True)
    ]
    how = reward_normalization(config)
    if not how.center:
        return raw, list(raw)
    executions = execution_keys(samples)
    kept = [i for i, is_judged in enumerate(judged) if is_judged]
    groups = [_group_of(samples[i]) for i in kept]
    values = normalize_rewards([raw[i] for i in kept], groups, [executions[i] for i in kept], how)
    rewards = [0.0] * len(samples)
    for position, value in zip(kept, values, strict=True):
        rewards[position] = value
    return raw, rewards


def normalize_rewards(
    rewards: Sequence[float],
    groups: Sequence[Hashable],
    executions: Sequence[Hashable],
    how: RewardNormalization,
) -> list[float]:
    """Each reward against its group's mean, over the group's standard deviation if `how.scale`.

    A group may have any size. An execution that fanned out into K samples counts once: each sibling
    weighs 1 / K in the mean and in the variance (sum of squares over N - 1 executions). So give
    each sibling the reward of the whole execution; no division by K.

    Args:
        rewards: one per sample, finite.
        groups: prompt group of each sample.
        executions: execution of each sample; siblings share it.
        how: see `RewardNormalization`; nothing happens unless `how.center`.

    Returns:
        Rewards in the same order. Equal rewards give exactly 0; a group of one execution is centred
        (so it has no signal) and not scaled.

    Source: GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2; without the division Dr. GRPO,
    arXiv:2503.20783.
    """
    if not how.center:
        return list(rewards)
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    result = [0.0] * len(rewards)
    for positions in members.values():
        values = [rewards[i] for i in positions]
        normalized = _normalize_group(values, [executions[i] for i in positions], how)
        for position, value in zip(positions, normalized, strict=True):
            result[position] = value
    return result


def execution_keys(samples: Sequence[Sample]) -> list[int]:
    """Execution of each sample: its `rollout_id`, or a number of its own where that is None."""
    unused = max((s.rollout_id for s in samples if s.rollout_id is not None), default=-1) + 1
    return [
        unused + position if sample.rollout_id is None else sample.rollout_id
        for position, sample in enumerate(samples)
    ]


def _normalize_group(
    values: list[float], executions: list[Hashable], how: RewardNormalization
) -> list[float]:
    sizes = Counter(executions)
    # Deviations from the first value, not from a rounded mean: n x 0.9 / n is not always 0.9, and
    # a residue of 1e-8 divided by (0 + 1e-6) would become an advantage of 0.01.
    shifted = [value - values[0] for value in values]
    mean = _weighted_sum(shifted, executions, sizes) / len(sizes)
    deviations = [value - mean for value in shifted]
    if not how.scale or len(sizes) == 1:
        return deviations
    squares = _weighted_sum([value**2 for value in deviations], executions, sizes)
    std = math.sqrt(squares / (len(sizes) - 1))
    return [value / (std + _STD_EPS) for value in deviations]


def _weighted_sum(
    values: list[float], executions: list[Hashable], sizes: Mapping[Hashable, int]
) -> float:
    if len(sizes) == len(values):  # nobody fanned out
        return math.fsum(values)
    return math.fsum(v / sizes[e] for v, e in zip(values, executions, strict=True))


def _finite_reward(sample: Sample, config: Config) -> float:
    value = sample.get_reward_value(config)
    if not math.isfinite(value):
        raise DataError(
            f"sample {sample.index}: reward {value}; a reward must be a finite number. Return "
            "0.0, or set remove_sample, where an answer cannot be judged."
        )
    return value


def _group_of(sample: Sample) -> int:
    if sample.group_index is None:
        raise DataError(
            f"sample {sample.index} has no group_index, so its reward cannot be compared with its "
            "group's; set it in the rollout function (one number per prompt), or give "
            "--disable-rewards-normalization."
        )
    return sample.group_index
