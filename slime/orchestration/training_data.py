"""Samples of a round into one batch per data-parallel rank, through the user's hooks."""

from argparse import Namespace
from typing import Any

from slime.config.config import Config
from slime.config.layout import micro_batch_multiple
from slime.data.batch import RolloutBatch
from slime.data.sample import Sample
from slime.plugins import load_function
from slime.training.batching import batch_metrics, batches_from_train_data, make_rollout_batches
from slime.training.rewards import execution_keys, post_process_rewards


def make_batches(
    samples: list[Sample], config: Config, args: Namespace, *, rollout_id: int, dp_size: int
) -> tuple[list[RolloutBatch], dict[str, float]]:
    """One batch per data-parallel rank, and what became of the samples (`rollout/...`).

    Args:
        args: handed to `--custom-convert-samples-to-train-data-path` and
            `--custom-reward-post-process-path`, which replace a part each.
    """
    layout: dict[str, Any] = {
        "rollout_id": rollout_id,
        "dp_size": dp_size,
        "cp_size": config.context_parallel_size,
        "micro_batch_multiple": micro_batch_multiple(config),
    }
    convert = config.custom_convert_samples_to_train_data_path
    if convert:
        data = load_function(convert)(args, samples)
        batches = batches_from_train_data(data, config, **layout)
    else:
        raw_rewards, rewards = _rewards(samples, config, args)
        batches = make_rollout_batches(samples, rewards, raw_rewards, config, **layout)
    counts = batch_metrics(len(samples), len(set(execution_keys(samples))), batches)
    return batches, {f"rollout/{name}": value for name, value in counts.items()}


def _rewards(samples: list[Sample], config: Config, args: Namespace) -> tuple[Any, Any]:
    custom = config.custom_reward_post_process_path
    if custom:
        return load_function(custom)(args, samples)
    return post_process_rewards(samples, config)
