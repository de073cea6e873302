"""Functions by dotted path: loading them once, and checking their signatures at start."""

import difflib
import functools
import importlib
import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slime.errors import ConfigError


@dataclass(frozen=True)
class Hook:
    """How slime calls the function behind one `--...-path` flag.

    Attributes:
        call: the call as documented, for messages.
        positional: number of positional arguments.
        keywords: keyword arguments.
        is_async: True: must be `async def`; False: must not be; None: either.
        methods: for a class, what its objects must have.
        optional_keywords: passed only when the function takes them.
    """

    call: str
    positional: int
    keywords: tuple[str, ...] = ()
    is_async: bool | None = False
    methods: tuple[str, ...] = ()
    optional_keywords: tuple[str, ...] = ()


_ROLLOUT = Hook(
    "fn(args, rollout_id, data_source, evaluation=False)", 3, ("evaluation",), is_async=None
)

HOOKS: dict[str, Hook] = {
    "rollout_function_path": _ROLLOUT,
    "eval_function_path": _ROLLOUT,
    "custom_generate_function_path": Hook(
        "async fn(args, sample, sampling_params)",
        3,
        is_async=True,
        optional_keywords=("evaluation",),
    ),
    "agent_function_path": Hook(
        "async fn(session, sample)", 2, is_async=True, optional_keywords=("evaluation",)
    ),
    "environment_path": Hook("fn(settings)", 1, is_async=None),
    "rollout_sample_hook_path": Hook(
        "fn(args, sample, *, rollout_id=None, evaluation=False)",
        2,
        ("rollout_id", "evaluation"),
        is_async=None,
    ),
    "custom_rm_path": Hook("async fn(args, sample)", 2, is_async=None),
    "dynamic_sampling_filter_path": Hook("fn(args, samples)", 2),
    "buffer_filter_path": Hook("fn(args, rollout_id, buffer, num_samples)", 4),
    "rollout_sample_filter_path": Hook("fn(args, data)", 2),
    "rollout_all_samples_process_path": Hook("fn(args, all_samples, data_source)", 3),
    "rollout_data_postprocess_path": Hook("fn(args, rollout_id, rollout_data)", 3),
    "data_source_path": Hook(
        "DataSource(args)", 1, methods=("get_samples", "add_samples", "save", "load", "__len__")
    ),
    "custom_reward_post_process_path": Hook("fn(args, samples)", 2),
    "custom_convert_samples_to_train_data_path": Hook("fn(args, samples)", 2),
    "custom_loss_function_path": Hook("fn(args, batch, logits, sum_of_sample_mean)", 4),
    "custom_tis_function_path": Hook(
        "fn(*, args, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, "
        "response_lengths)",
        0,
        (
            "args",
            "pg_loss",
            "train_log_probs",
            "rollout_log_probs",
            "loss_masks",
            "total_lengths",
            "response_lengths",
        ),
    ),
    "custom_pg_loss_reducer_function_path": Hook(
        "fn(total_lengths, response_lengths, loss_masks, calculate_per_token_loss)", 4
    ),
    "custom_advantage_function_path": Hook("fn(args, rollout_data)", 2),
    "custom_model_provider_path": Hook(
        "fn(pre_process, post_process)", 2, optional_keywords=("vp_stage",)
    ),
    "custom_megatron_init_path": Hook("fn(args)", 1),
    "custom_megatron_before_log_prob_hook_path": Hook("fn(args, model, store_prefix)", 3),
    "custom_megatron_before_train_step_hook_path": Hook(
        "fn(args, rollout_id, step_id, model, optimizer, opt_param_scheduler)", 6
    ),
    "custom_rollout_log_function_path": Hook(
        "fn(rollout_id, args, samples, extra_metrics, rollout_time)", 5
    ),
    "custom_eval_rollout_log_function_path": Hook("fn(rollout_id, args, data, extra_metrics)", 4),
    "custom_update_weight_post_write_path": Hook("fn(args, version_dir, rollout_engines)", 3),
}


# The function behind Megatron's own flag --spec, which names it by two words.
SPEC_HOOK = Hook("fn(args, config, vp_stage)", 3)

# Documented paths of functions that are built in: no module has them.
BUILT_IN_PATHS = frozenset({"slime.backends.megatron_utils.loss.icepop_function"})


@functools.cache
def load_function(path: str) -> Any:
    """The object at a dotted path such as `package.module.function`; the same object each time.

    Raises:
        ConfigError: no such module, nothing of that name in it, or the module raised at import.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name or not name:
        raise ConfigError(f"{path!r} is no dotted path; write package.module.function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module missing *inside* the user's module is another mistake than a wrong path.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _import_failure(path, module_name, error) from error
        raise ConfigError(
            f"cannot load {path!r}: there is no module {error.name!r}; is its folder on PYTHONPATH?"
        ) from error
    except (Exception, SystemExit) as error:
        raise _import_failure(path, module_name, error) from error
    if not hasattr(module, name):
        public = [word for word in vars(module) if not word.startswith("_")]
        raise ConfigError(f"module {module_name!r} has no {name!r}{nearest(name, public)}")
    return getattr(module, name)


def _import_failure(path: str, module_name: str, error: BaseException) -> ConfigError:
    """What a user's module raised while it was imported, with the line that did."""
    ours = (__file__, importlib.__file__)
    lines = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename not in ours
    ]
    # A SyntaxError tells its line itself, and has no frame there.
    place = f" at {lines[-1]}" if lines and not isinstance(error, SyntaxError) else ""
    return ConfigError(
        f"cannot load {path!r}: importing {module_name!r} raised {type(error).__name__}: "
        f"{error}{place}; try `python -c 'import {module_name}'`"
    )


def check_signature(dest: str, function: Any, *, path: str = "") -> None:
    """Nothing, when slime can call `function` the way the flag `dest` documents.

    Args:
        dest: the flag's attribute, such as `custom_rm_path`.
        function: what the path leads to.
        path: as the user wrote it, for the message.

    Raises:
        ConfigError: not callable, other parameters, or async where slime does not await (and the
            other way round).
    """
    check_callable(f"--{dest.replace('_', '-')} {path}".strip(), HOOKS[dest], function)


def check_callable(where: str, hook: Hook, function: Any) -> None:
    """Nothing, when slime can call `function` as `hook` says.

    Args:
        where: the flag and what the user wrote after it, for the message.

    Raises:
        ConfigError: as `check_signature`.
    """
    if not callable(function):
        raise ConfigError(f"{where}: must be callable as {hook.call}, found {function!r}")
    missing = [name for name in hook.methods if not hasattr(function, name)]
    if missing:
        raise ConfigError(f"{where}: must be a class {hook.call} with {', '.join(missing)} too")
    _check_parameters(where, hook, function)
    _check_async(where, hook, function)


def spec_path(words: Sequence[str]) -> str:
    """The dotted path in the words of --spec, `package.module function`.

    Raises:
        ConfigError: there are not two.
    """
    if len(words) != 2:
        raise ConfigError(
            f"--spec {' '.join(words)}: must be a module and a function in it, as in --spec "
            "slime_plugins.models.glm4 get_glm_spec"
        )
    return ".".join(words)


def accepts_keyword(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` takes the keyword argument `name`, by name or through **kwargs."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    keyword_kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        or (parameter.name == name and parameter.kind in keyword_kinds)
        for parameter in parameters
    )


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """`; did you mean 'x'?` when something in `known` is spelt nearly like `word`, else nothing."""
    match = nearest_word(word, known)
    return f"; did you mean {match!r}?" if match else ""


def nearest_word(word: str, known: list[str] | tuple[str, ...]) -> str | None:
    """The word of `known` that is spelt nearly like `word`, if there is one."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _check_parameters(where: str, hook: Hook, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some C functions have none
        return
    try:
        signature.bind(*range(hook.positional), **dict.fromkeys(hook.keywords))
    except TypeError as error:
        raise ConfigError(
            f"{where}: slime calls {hook.call}, found {signature}: {error}"
        ) from error


def _check_async(where: str, hook: Hook, function: Callable[..., Any]) -> None:
    if hook.is_async is None or not inspect.isfunction(function):
        return
    if inspect.iscoroutinefunction(function) != hook.is_async:
        wanted = "`async def`" if hook.is_async else "a plain `def`"
        raise ConfigError(f"{where}: slime calls {hook.call}, so it must be {wanted}")
