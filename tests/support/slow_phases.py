"""Functions of a user that take a known time in each phase of a round; seconds."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from slime.data.data_source import RolloutDataSourceWithBuffer
from slime.data.sample import Sample
from slime.rollout import sglang_rollout

DATA_S = 0.2
GENERATE_S = 0.35
REWARD_S = 0.25
ADVANTAGE_S = 0.15
LOG_PROBS_S = 0.3
TRAIN_S = 0.4
SYNC_S = 0.45
SAVE_S = 0.22

FLAGS = (
    "--data-source-path support.slow_phases.SlowSource "
    "--custom-generate-function-path support.slow_phases.generate "
    "--custom-rm-path support.slow_phases.reward "
    "--rollout-data-postprocess-path support.slow_phases.look_at_advantages "
    "--custom-megatron-init-path support.slow_phases.gather_slowly "
    "--custom-megatron-before-log-prob-hook-path support.slow_phases.before_log_probs "
    "--custom-megatron-before-train-step-hook-path support.slow_phases.before_train_step "
)


class SlowSource(RolloutDataSourceWithBuffer):
    """Takes its time to give prompts, and to save where it is."""

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        time.sleep(DATA_S)
        return super().get_samples(num_samples)

    def save(self, rollout_id: int) -> None:
        time.sleep(SAVE_S)
        super().save(rollout_id)


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """One turn, after a wait."""
    await asyncio.sleep(GENERATE_S)
    return await sglang_rollout.generate(args, sample, sampling_params)


async def reward(args: Any, sample: Sample) -> float:
    """Different within a group, after a wait."""
    await asyncio.sleep(REWARD_S)
    return float((sample.index or 0) % 2)


def look_at_advantages(args: Any, rollout_id: int, rollout_data: Any) -> None:
    """For --rollout-data-postprocess-path."""
    time.sleep(ADVANTAGE_S)


def before_log_probs(args: Any, model: Any, store_prefix: str) -> None:
    time.sleep(LOG_PROBS_S)


def before_train_step(*args: Any) -> None:
    """Before the one optimizer step of a round."""
    time.sleep(TRAIN_S)


def gather_slowly(args: Any) -> None:
    """For --custom-megatron-init-path: from now on weights of this rank take a while to gather."""
    from slime.orchestration import ways

    real = ways.sync_weights

    def late(named: Iterator[Any]) -> Iterator[Any]:
        time.sleep(SYNC_S)
        yield from named

    ways.sync_weights = lambda named, **rest: real(late(named), **rest)
