"""Metrics of a round and of an evaluation, computed from their samples. Pure; no torch.

Names, units and meanings are registered in `slime/observability/metrics.py`.
"""

import math
import statistics
import zlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

from slime.data.sample import Sample
from slime.data.versions import is_split_unknown, num_policies
from slime.observability.metrics import spread

Metrics = dict[str, float]
Status = Sample.Status

# A reward of at least this counts as solved in pass@k.
SOLVED_REWARD = 1.0
MIN_ZERO_STD = 1e-6
# A zlib stream of any text at all: header, one block, checksum.
_LEAST_COMPRESSED_BYTES = 9
# Prose shrinks to a half or a third; text that repeats one sentence to a fiftieth.
REPETITION_RATIO = 10.0
REPETITION_TAIL_CHARS = 10_000
# Metric under usage/ -> the count it sums up.
_USAGE = {
    "requests": "requests",
    "tokens_in": "tokens_in",
    "tokens_out": "tokens_out",
    "engine_time": "engine_time_s",
    "other_time": "other_time_s",
}


def rollout_metrics(samples: Sequence[Sample], args: Any, seconds: float) -> Metrics:
    """`rollout/*`, `perf/*` and, where flags ask for them, `passrate/*` and `multi_turn/*`.

    Args:
        samples: of the round, fan-outs opened; must not be empty.
        args: read are reward_key, eval_reward_key, rollout_num_gpus, rollout_max_response_len and
            the log_* flags.
        seconds: the round took.
    """
    rewards = _rewards(samples, args)
    metrics = _under("rollout/", sample_metrics(samples, args))
    if rewards:
        metrics["rollout/raw_reward"] = statistics.fmean(rewards.values())
    metrics |= speed_metrics(samples, seconds, num_gpus=args.rollout_num_gpus or 1)
    if args.log_passrate:
        groups = _by_group(samples, rewards)
        metrics |= {f"passrate/pass@{k}": value for k, value in pass_at_k(groups).items()}
    if args.log_multi_turn:
        metrics |= multi_turn_metrics(samples, args.rollout_max_response_len)
    if args.log_correct_samples:
        solved = [s.response_length for i, s in enumerate(samples) if _is_solved(rewards.get(i))]
        metrics |= spread("rollout/correct_samples/response_len", solved)
    return metrics


def eval_metrics(data: Mapping[str, Mapping[str, Any]], args: Any) -> Metrics:
    """`eval/{name}`, `eval/{name}-truncated_ratio`, `eval/{name}-pass@{k}` and `eval/{name}/*`.

    pass@k takes the group sizes from the samples, so each dataset may have its own.

    Args:
        data: as in `RolloutFnEvalOutput`; a dataset without rewards gives no metrics.
        args: as for `rollout_metrics`.
    """
    metrics: Metrics = {}
    for name, entry in data.items():
        rewards = [float(reward) for reward in entry["rewards"]]
        if not rewards:
            continue
        metrics[f"eval/{name}"] = statistics.fmean(rewards)
        if entry.get("truncated"):
            metrics[f"eval/{name}-truncated_ratio"] = statistics.fmean(
                map(bool, entry["truncated"])
            )
        samples = cast(Sequence[Sample], entry.get("samples") or ())
        if not samples:
            continue
        metrics |= _under(f"eval/{name}/", sample_metrics(samples, args, evaluation=True))
        if args.log_passrate:
            groups = _by_group(samples, dict(enumerate(rewards)))
            metrics |= {f"eval/{name}-pass@{k}": value for k, value in pass_at_k(groups).items()}
    return metrics


def sample_metrics(samples: Sequence[Sample], args: Any, *, evaluation: bool = False) -> Metrics:
    """What a list of samples is summed up to, without a prefix.

    Args:
        samples: not empty.
        evaluation: use --eval-reward-key.
    """
    count = len(samples)
    metrics = spread("response_len", [sample.response_length for sample in samples])
    metrics["truncated_ratio"] = sum(s.status is Status.TRUNCATED for s in samples) / count
    metrics["repetition_frac"] = sum(is_repetitive(s.response) for s in samples) / count
    metrics |= zero_std_metrics(_by_group(samples, _rewards(samples, args, evaluation=evaluation)))
    metrics |= _engine_metrics(samples) | _version_metrics(samples)
    metrics |= _category_metrics(samples, args.log_reward_category)
    metrics |= usage_metrics([s.usage for s in samples if s.usage])
    metrics |= _episode_metrics(samples)
    return metrics


def speed_metrics(samples: Sequence[Sample], seconds: float, *, num_gpus: int) -> Metrics:
    """`perf/*` tokens per second of a round; "effective" counts only tokens that train."""
    seconds = max(seconds, 1e-9)
    lengths = [sample.response_length for sample in samples]
    effective = [0 if s.remove_sample else s.effective_response_length for s in samples]
    metrics: Metrics = {
        "perf/tokens_per_gpu_per_sec": sum(lengths) / seconds / num_gpus,
        "perf/effective_tokens_per_gpu_per_sec": sum(effective) / seconds / num_gpus,
        "perf/longest_sample_tokens_per_sec": max(lengths) / seconds,
        "perf/longest_effective_sample_tokens_per_sec": max(effective) / seconds,
    }
    waits = [sample.non_generation_time for sample in samples]
    if any(waits):
        metrics |= spread("perf/non_generation_time", waits)
        for name, sizes in (("longest_sample", lengths), ("longest_effective_sample", effective)):
            longest = max(range(len(samples)), key=sizes.__getitem__)
            generating = max(seconds - waits[longest], 1e-9)
            metrics[f"perf/{name}_non_generation_time"] = waits[longest]
            metrics[f"perf/{name}_tokens_per_sec_without_non_generation"] = (
                sizes[longest] / generating
            )
    return metrics


def pass_at_k(groups: Mapping[Hashable, Sequence[float]]) -> dict[int, float]:
    """k -> chance that one of k tries solves a prompt, for k = 1, 2, 4, ... up to the group size.

    Args:
        groups: rewards of each prompt's tries; a prompt with fewer than k tries is left out of
            pass@k.

    Source: the unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021, arXiv:2107.03374,
    section 2.1.
    """
    result: dict[int, float] = {}
    largest = max(map(len, groups.values()), default=0)
    k = 1
    while k <= largest:
        chances: list[float] = []
        for rewards in groups.values():
            n, solved = len(rewards), sum(map(_is_solved, rewards))
            if n >= k:
                chances.append(1.0 - math.comb(n - solved, k) / math.comb(n, k))
        result[k] = statistics.fmean(chances)
        k *= 2
    return result


def zero_std_metrics(groups: Mapping[Hashable, Sequence[float]]) -> Metrics:
    """`zero_std/count_{reward}`: groups whose members all got this reward; they teach nothing."""
    counts: Counter[float] = Counter()
    for rewards in groups.values():
        if len(rewards) > 1 and _has_zero_std(rewards):
            counts[round(rewards[0], 1)] += 1
    return {f"zero_std/count_{reward}": count for reward, count in sorted(counts.items())}


def _has_zero_std(rewards: Sequence[float]) -> bool:
    """Whether the standard deviation is at most `MIN_ZERO_STD`; False where it does not exist.

    statistics.pstdev is exact and slow; the range decides nearly always, as no deviation is below
    range / sqrt(2 n), nor above the range.
    """
    if not all(map(math.isfinite, rewards)):
        return False
    width = max(rewards) - min(rewards)
    if width > 1.01 * MIN_ZERO_STD * math.sqrt(2 * len(rewards)):
        return False
    if width < 0.99 * MIN_ZERO_STD:
        return True
    return statistics.pstdev(rewards) <= MIN_ZERO_STD


def multi_turn_metrics(samples: Sequence[Sample], max_response_len: int | None) -> Metrics:
    """`multi_turn/*`: lengths with and without what tools said, and rounds, of each sample."""
    lengths = {
        "raw_response_length": [sample.response_length for sample in samples],
        "wo_obs_response_length": [sample.effective_response_length for sample in samples],
    }
    metrics: Metrics = {}
    for name, values in lengths.items():
        prefix = f"multi_turn/{name}"
        metrics[f"{prefix}/response_length_mean"] = statistics.fmean(values)
        metrics[f"{prefix}/response_length_max"] = max(values)
        metrics[f"{prefix}/response_length_min"] = min(values)
        if max_response_len is not None:
            clipped = sum(value >= max_response_len for value in values)
            metrics[f"{prefix}/response_length_clip_ratio"] = clipped / len(values)
    rounds = [s.metadata["round_number"] for s in samples if "round_number" in s.metadata]
    if rounds:
        prefix = "multi_turn/multi_turn_metric/round_number"
        metrics[f"{prefix}_mean"] = statistics.fmean(rounds)
        metrics[f"{prefix}_max"] = max(rounds)
        metrics[f"{prefix}_min"] = min(rounds)
    return metrics


def usage_metrics(usages: Sequence[Mapping[str, float]]) -> Metrics:
    """`usage/*`: what executions of a custom generate function asked of engines and tools.

    Args:
        usages: as `slime.engines.usage.Usage.added_to` gives them, one per execution.
    """
    metrics: Metrics = {}
    for name, key in _USAGE.items():
        metrics |= spread(f"usage/{name}", [usage[key] for usage in usages])
    calls = [usage["tool_calls"] for usage in usages]
    if any(calls):
        metrics |= spread("usage/tool_calls", calls)
        errors = sum(usage["tool_errors"] for usage in usages)
        metrics["usage/tool_error_ratio"] = errors / sum(calls)
    return metrics


def is_repetitive(text: str) -> bool:
    """Whether the end of `text` compresses so well that it must repeat itself."""
    tail = text[-REPETITION_TAIL_CHARS:].encode(errors="replace")
    if len(tail) <= REPETITION_RATIO * _LEAST_COMPRESSED_BYTES:
        return False
    return len(tail) / len(zlib.compress(tail, 1)) > REPETITION_RATIO


def _engine_metrics(samples: Sequence[Sample]) -> Metrics:
    """Prefix cache and speculative decoding, where the engines reported them."""
    metrics: Metrics = {}
    cached = sum(sample.prefix_cache_info.cached_tokens for sample in samples)
    prompted = sum(sample.prefix_cache_info.total_prompt_tokens for sample in samples)
    if prompted:
        metrics["prefix_cache_hit_rate"] = cached / prompted
        metrics["avg_cached_tokens_per_sample"] = cached / len(samples)
    drafted = sum(sample.spec_info.spec_draft_token_num for sample in samples)
    verified = sum(sample.spec_info.spec_verify_ct for sample in samples)
    if drafted and verified:
        accepted = sum(sample.spec_info.spec_accept_token_num for sample in samples)
        written = sum(sample.spec_info.completion_token_num for sample in samples)
        metrics["spec_accept_rate"] = accepted / drafted
        metrics["spec_accept_length"] = written / verified
    return metrics


def _version_metrics(samples: Sequence[Sample]) -> Metrics:
    """Samples written by several policies, and those of them whose split nobody knows."""
    mixed = sum(num_policies(sample.version_spans) > 1 for sample in samples)
    if not mixed:
        return {}
    unknown = sum(is_split_unknown(sample.version_spans) for sample in samples)
    return {
        "mixed_versions_ratio": mixed / len(samples),
        "unknown_split_ratio": unknown / len(samples),
    }


def _episode_metrics(samples: Sequence[Sample]) -> Metrics:
    """`environment/*` of the samples that played an episode, as --environment-path leaves them."""
    episodes: list[Mapping[str, Any]] = [
        episode
        for sample in samples
        if isinstance(episode := sample.metadata.get("episode"), Mapping)
        and "invalid_actions" in episode
    ]
    if not episodes:
        return {}
    steps = [len(episode["actions"]) for episode in episodes]
    invalid = sum(episode["invalid_actions"] for episode in episodes)
    return spread("environment/steps", steps) | {
        "environment/terminated_ratio": statistics.fmean(bool(e["terminated"]) for e in episodes),
        "environment/invalid_action_ratio": invalid / max(sum(steps), 1),
        "environment/restarts": sum(episode["restarts"] for episode in episodes),
    }


def _category_metrics(samples: Sequence[Sample], reward_category: str | None) -> Metrics:
    """`error_cat/{category}`: share of samples that failed so, or that the reward put there."""
    counts: Counter[str] = Counter()
    for sample in samples:
        if sample.status is Status.FAILED and "error_cat" in sample.metadata:
            counts[str(sample.metadata["error_cat"])] += 1
        elif reward_category is not None and isinstance(sample.reward, dict):
            counts[str(sample.reward.get(reward_category))] += 1
    return {f"error_cat/{name}": count / len(samples) for name, count in sorted(counts.items())}


def _rewards(samples: Sequence[Sample], args: Any, *, evaluation: bool = False) -> dict[int, float]:
    """Position -> reward of the samples that have one; failed samples have none."""
    return {
        i: sample.get_reward_value(args, evaluation=evaluation)
        for i, sample in enumerate(samples)
        if sample.reward is not None
    }


def _by_group(
    samples: Sequence[Sample], rewards: Mapping[int, float]
) -> dict[Hashable, list[float]]:
    """Rewards of each prompt group; a fan-out counts once, by its last sample."""
    executions: dict[Hashable, dict[Hashable, float]] = {}
    for position, reward in rewards.items():
        sample = samples[position]
        group = ("alone", position) if sample.group_index is None else sample.group_index
        execution = ("alone", position) if sample.rollout_id is None else sample.rollout_id
        executions.setdefault(group, {})[execution] = reward
    return {group: list(values.values()) for group, values in executions.items()}


def _is_solved(reward: float | None) -> bool:
    return reward is not None and reward >= SOLVED_REWARD


def _under(prefix: str, metrics: Metrics) -> Metrics:
    return {prefix + name: value for name, value in metrics.items()}
