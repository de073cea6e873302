"""resolve(): derived values and the rules that span flags; the only place that derives."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from slime.config.agent import AGENT_GENERATE
from slime.config.async_rules import DEFAULT_ROLLOUT, FULLY_ASYNC_ROLLOUT
from slime.config.checkpoints import (
    HALF_WRITTEN,
    TRACKER_FILE,
    has_megatron_checkpoint,
    is_hf_folder,
    saved_so_far,
)
from slime.config.config import Config
from slime.config.environments import ENVIRONMENT_GENERATE
from slime.config.eval_datasets import resolve_eval
from slime.config.flag_checks import check_flag_states, check_numbers
from slime.config.foreign import typed_megatron_argv, untyped_megatron_argv
from slime.config.problems import Problems
from slime.config.routing import router_options
from slime.config.rules import check_rules, nearest_divisors
from slime.errors import ConfigError

logger = logging.getLogger(__name__)


def resolve(config: Config) -> Config:
    """`config` with every value that follows from others filled in, checked by all rules.

    What only the cluster can tell (`--device auto`) stays open. Resolving twice changes nothing.

    Raises:
        ConfigError: refused flags, or flags that cannot work together; says what to change.
    """
    problems = Problems()
    resolved = resolve_into(problems, config)
    problems.raise_all()
    return resolved


def resolve_into(problems: Problems, config: Config) -> Config:
    """As `resolve`, but what is wrong goes into `problems`; the config is then as far as it got."""
    check_flag_states(config, problems)
    check_numbers(config, problems)
    for derive, fills in _DERIVED:
        with problems.caught(spoils=fills):
            config = replace(config, **derive(problems.readable(config)))
    with problems.caught(spoils=("eval_datasets",)):
        config = resolve_eval(config)
    check_numbers(config, problems)
    check_rules(config, problems)
    words = (*untyped_megatron_argv(config.megatron_argv), *typed_megatron_argv(config))
    return replace(config, megatron_argv=words)


def check_overlapping(config: Config) -> None:
    """Nothing, when the next round may be generated while the model trains, as train_async.py does.

    Raises:
        ConfigError: one side leaves the devices' memory to the other.
    """
    leaves = [
        name
        for name, is_on in (("train", config.offload_train), ("rollout", config.offload_rollout))
        if is_on
    ]
    if leaves and config.colocate:
        raise ConfigError(
            "--colocate: train_async.py generates while it trains, and here the sides take turns; add "
            + " ".join(f"--no-offload-{name}" for name in leaves)
            + " where both fit on the devices at once, give each devices of its own, or run train.py"
        )
    if "rollout" in leaves:
        raise ConfigError(
            "--offload-rollout: train_async.py generates while it trains, when engines would have no memory; leave "
            "it out or run train.py"
        )


def check_alternating(config: Config) -> None:
    """Nothing, when a round is generated before the model trains on it, as train.py does.

    Raises:
        ConfigError: weights are to change in the middle of a round.
    """
    if config.fully_async:
        raise ConfigError(
            "--fully-async: train.py generates a round, then trains on it; run train_async.py"
        )
    if config.update_weights_in_flight:
        raise ConfigError(
            "--update-weights-in-flight: train.py changes weights between rounds; leave it out or "
            "run train_async.py"
        )


def _debug(config: Config) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if config.load_debug_rollout_data is not None:
        changes["debug_train_only"] = True
    if config.dump_details is not None:
        folder = Path(config.dump_details)
        if config.save_debug_rollout_data is None:
            changes["save_debug_rollout_data"] = str(folder / "rollout_data" / "{rollout_id}.pt")
        if config.save_debug_train_data is None:
            changes["save_debug_train_data"] = str(folder / "train_data" / "{rollout_id}.pt")
    return changes


def _placement(config: Config) -> dict[str, Any]:
    """Who sits where: colocated engines get the trainer's slots, and by default both sides take turns."""
    shares = config.colocate or config.offload
    changes: dict[str, Any] = {
        "offload_train": shares if config.offload_train is None else config.offload_train,
        "offload_rollout": shares if config.offload_rollout is None else config.offload_rollout,
    }
    if config.rollout_external_engine_addrs is not None:
        if config.rollout_num_gpus:
            logger.warning(
                "--rollout-num-gpus %d has no effect with --rollout-external-engine-addrs",
                config.rollout_num_gpus,
            )
        changes["rollout_num_gpus"] = 0
    elif config.rollout_num_gpus is None and config.debug_train_only:
        changes["rollout_num_gpus"] = 0
    elif config.rollout_num_gpus is None and config.colocate:
        world_size = config.actor_num_nodes * config.actor_num_gpus_per_node
        changes["rollout_num_gpus"] = world_size
    return changes


def _batch(config: Config) -> dict[str, Any]:
    prompts = config.rollout_batch_size
    if prompts is None:
        raise ConfigError("--rollout-batch-size is missing; say how many prompts a round takes")
    changes: dict[str, Any] = {}
    if config.over_sampling_batch_size is None:
        changes["over_sampling_batch_size"] = prompts
    total = prompts * config.n_samples_per_prompt
    steps = config.num_steps_per_rollout
    if steps is not None:
        changes["global_batch_size"] = _batch_of_steps(config, total, steps)
    elif config.global_batch_size is None:
        changes["global_batch_size"] = total
    return changes


def _batch_of_steps(config: Config, total: int, steps: int) -> int:
    """The global batch size that makes `steps` equal optimizer steps of `total` samples."""
    if steps < 1 or total % steps:
        raise ConfigError(
            f"--num-steps-per-rollout {steps} does not divide --rollout-batch-size x "
            f"--n-samples-per-prompt = {total}; try {nearest_divisors(total, steps)}"
        )
    if config.global_batch_size not in (None, total // steps):
        raise ConfigError(
            f"--global-batch-size {config.global_batch_size} and --num-steps-per-rollout {steps} "
            f"contradict each other: {total} samples in {steps} steps are {total // steps} a step; "
            "give one of the two"
        )
    return total // steps


def _algorithm(config: Config) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if config.eps_clip_high is None:
        changes["eps_clip_high"] = config.eps_clip
    if config.n_samples_per_prompt == 1:
        # One sample has no deviation to divide by.
        changes["disable_grpo_std_normalization"] = True
    if config.advantage_estimator.startswith("reinforce_plus_plus"):
        changes["normalize_advantages"] = True
    if (config.use_kl_loss or config.kl_coef != 0.0) and config.ref_load is None:
        changes["ref_load"] = config.hf_checkpoint
    return changes


def _rollout(config: Config) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    function = config.rollout_function_path
    if config.fully_async and function == DEFAULT_ROLLOUT:
        function = FULLY_ASYNC_ROLLOUT
    if function == FULLY_ASYNC_ROLLOUT:
        changes |= {"fully_async": True, "rollout_function_path": function}
        changes["update_weights_in_flight"] = True
    if config.rollout_max_prompt_len is None and config.rollout_max_context_len is not None:
        changes["rollout_max_prompt_len"] = config.rollout_max_context_len - 1
    if config.eval_function_path is None:
        changes["eval_function_path"] = function
    if config.eval_reward_key is None:
        changes["eval_reward_key"] = config.reward_key
    return changes


def _checkpoint(config: Config) -> dict[str, Any]:
    """Where weights come from: the run's own checkpoint, else initial ones and a new start."""
    if config.debug_rollout_only:
        return {}
    if config.load and has_megatron_checkpoint(config.load):
        _name_halves(config.load, saved_so_far(config.load))
        return {}
    initial = config.ref_load or config.hf_checkpoint
    if config.load is not None and is_hf_folder(config.load):
        initial = config.load
    elif config.load is not None and config.load != initial:
        _check_first_start(config.load, config.save)
    changes: dict[str, Any] = {
        "load": initial,
        "finetune": True,
        "no_load_optim": True,
        "no_load_rng": True,
    }
    if config.start_rollout_id is None:
        changes["start_rollout_id"] = 0
    return changes


def _routing(config: Config) -> dict[str, Any]:
    """The policy of the router; of one that somebody else runs only what the flags say of it is known."""
    if config.sglang_router_ip is not None:
        return {}
    return {"router_argv": router_options(config.router_argv)}


def _generating(config: Config) -> dict[str, Any]:
    if config.custom_generate_function_path is not None:
        return {}
    if config.agent_function_path is not None:
        return {"custom_generate_function_path": AGENT_GENERATE}
    if config.environment_path is not None:
        return {"custom_generate_function_path": ENVIRONMENT_GENERATE}
    return {}


# (what derives, what nobody can go by when it cannot)
_DERIVED: tuple[tuple[Callable[[Config], dict[str, Any]], tuple[str, ...]], ...] = (
    (_debug, ()),
    (_placement, ("rollout_num_gpus",)),
    (_batch, ("global_batch_size", "over_sampling_batch_size")),
    (_algorithm, ()),
    (_rollout, ()),
    (_generating, ()),
    (_routing, ()),
    (_checkpoint, ("load", "start_rollout_id")),
)


def _check_first_start(load: str, save: str | None) -> None:
    """Nothing, when --load is the folder this run saves to and has not saved to yet.

    Raises:
        ConfigError: the folder holds no checkpoint: a run must not begin at rollout 0 where one
            was to be continued.
    """
    found = saved_so_far(load)
    halves = _name_halves(load, found)
    if save is None or Path(save).resolve() != Path(load).resolve() or len(halves) < len(found):
        there = f"it holds {', '.join(found)}, but no {TRACKER_FILE}" if found else "it holds none"
        raise ConfigError(
            f"--load {load} is no checkpoint ({there if Path(load).is_dir() else 'no such folder'}). "
            "Check the path; leave --load out to begin with --ref-load or --hf-checkpoint. Only a "
            "--load equal to --save may be empty, for a run's first start."
        )
    logger.info("--load %s: nothing was saved there yet, this is the first start", load)


def _name_halves(folder: str, found: list[str]) -> list[str]:
    """Checkpoints in `folder` that a kill left half-written; a warning names them."""
    halves = [name for name in found if name.endswith(HALF_WRITTEN)]
    if halves:
        logger.warning("%s: half-written and not used: %s", folder, ", ".join(halves))
    return halves
