"""check_hooks(): every function a user named is there and can be called, before the run starts."""

from collections.abc import Iterable
from typing import Any, cast

from slime.config.config import Config
from slime.plugins import BUILT_IN_PATHS, HOOKS, check_signature, load_function

# These run in the train actors and may import what only they have; the others in the rollout actor.
TRAIN_HOOKS = (
    "custom_model_provider_path",
    "custom_loss_function_path",
    "custom_tis_function_path",
    "custom_pg_loss_reducer_function_path",
    "custom_advantage_function_path",
    "custom_megatron_init_path",
    "custom_megatron_before_log_prob_hook_path",
    "custom_megatron_before_train_step_hook_path",
    "custom_update_weight_post_write_path",
    "rollout_data_postprocess_path",
)
ROLLOUT_HOOKS = tuple(name for name in HOOKS if name not in TRAIN_HOOKS)


def check_hooks(config: Config, names: Iterable[str] = tuple(HOOKS)) -> None:
    """Nothing, when the functions behind the flags `names` load and take what slime gives them.

    Raises:
        ConfigError: no such module or function, or one with another signature.
    """
    for name in names:
        for path in _paths(getattr(config, name)):
            check_signature(name, load_function(path), path=path)


def _paths(value: Any) -> tuple[str, ...]:
    if value is None or value in BUILT_IN_PATHS:
        return ()
    return (value,) if isinstance(value, str) else cast(tuple[str, ...], value)
