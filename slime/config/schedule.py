"""How long the learning rate of a run warms up and decays, in optimizer steps."""

from collections.abc import Iterator

from slime.config.config import Config
from slime.config.foreign import megatron_values


def num_train_steps(config: Config) -> int | None:
    """Optimizer steps of the whole run, at least 1; None while its length is not known.

    With --num-epoch that is before the prompts are counted.
    """
    rounds, prompts = config.num_rollout, config.rollout_batch_size
    if rounds is None or prompts is None or config.global_batch_size is None:
        return None
    samples = rounds * prompts * config.n_samples_per_prompt
    return max(samples // config.global_batch_size, 1)


def num_warmup_steps(config: Config, num_decay_steps: int) -> float:
    """Optimizer steps in which the learning rate grows; none in a run that takes no steps."""
    if config.num_rollout == 0:
        return 0
    megatron = megatron_values(config.megatron_argv)
    fraction: float | None = megatron["lr_warmup_fraction"]
    return megatron["lr_warmup_iters"] if fraction is None else fraction * num_decay_steps


def schedule(config: Config) -> Iterator[str]:
    """Something is left to decay, or to hold, once the learning rate is warm."""
    steps = megatron_values(config.megatron_argv)["lr_decay_iters"] or num_train_steps(config)
    if steps is None or config.debug_rollout_only:
        return
    if (warmup := num_warmup_steps(config, steps)) >= steps:
        yield (
            f"the warm-up takes {warmup:g} of {steps} optimizer steps, so nothing is left to "
            "decay; lower --lr-warmup-iters (or --lr-warmup-fraction), or give --lr-decay-iters"
        )
