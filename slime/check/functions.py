"""check_functions(): functions named in flags are there and fit, read from their source alone.

A run imports them (`config/hooks.py`), which may take long or need a GPU. Here a stand-in with the
same parameters goes through the very same judgement, `plugins.check_callable`.
"""

import ast
import inspect
import logging
from collections.abc import Iterator
from typing import Any, cast

from slime.check.modules import Found, Function, Module, Modules, top_level_imports
from slime.config.config import Config
from slime.config.foreign import megatron_values
from slime.config.problems import Problems
from slime.errors import ConfigError
from slime.plugins import BUILT_IN_PATHS, HOOKS, SPEC_HOOK, Hook, check_callable, spec_path

logger = logging.getLogger(__name__)

_EMPTY_BASES = {"object", "Protocol", "ABC", "Generic"}
_Parameter = inspect.Parameter


def check_functions(config: Config, problems: Problems, modules: Modules) -> None:
    """Note every function that is missing or that slime could not call."""
    view = problems.readable(config)
    for name in HOOKS:
        with problems.caught():
            for path in _paths(getattr(view, name)):
                with problems.caught():
                    _check(name, path, modules)
    with problems.caught():
        if (words := megatron_values(view.megatron_argv)["spec"]) is not None:
            where = f"--spec {' '.join(words)}"
            _check_path("--spec", where, SPEC_HOOK, spec_path(words), modules)
    with problems.caught():
        for dataset in view.eval_datasets:
            for name in ("custom_rm_path", "custom_generate_function_path"):
                path: str | None = getattr(dataset, name)
                if path is not None:
                    with problems.caught():
                        _check(name, path, modules)


def _paths(value: Any) -> tuple[str, ...]:
    if value is None or value in BUILT_IN_PATHS:
        return ()
    return (value,) if isinstance(value, str) else cast(tuple[str, ...], value)


def _check(dest: str, path: str, modules: Modules) -> None:
    flag = "--" + dest.replace("_", "-")
    _check_path(flag, f"{flag} {path}", HOOKS[dest], path, modules)


def _check_path(flag: str, where: str, hook: Hook, path: str, modules: Modules) -> None:
    module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name or not name:
        raise ConfigError(f"{flag}: {path!r} is no dotted path; write package.module.function")
    try:
        module = modules.read(module_name)
        found = modules.find(module, name)
        _check_imports(module, modules)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{flag}: cannot load {path!r}: there is no module {error.name!r}; is its folder on "
            "PYTHONPATH?"
        ) from error
    except SyntaxError as error:
        raise ConfigError(
            f"{flag}: cannot load {path!r}: {error.filename} line {error.lineno} is no Python: "
            f"{error.msg}"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{flag}: cannot load {path!r}: {error}") from error
    stand_in = _stand_in(found, modules)
    if stand_in is None:
        logger.warning("%s %s is there; only the run can check its parameters", flag, path)
        return
    check_callable(where, hook, stand_in)


def _check_imports(module: Module, modules: Modules) -> None:
    if module.tree is None:
        return
    for name, line in top_level_imports(module.tree):
        top = name.partition(".")[0]
        if not modules.exists(top):
            raise ConfigError(
                f"{module.path} line {line} imports {top!r}, which is not there; install it or put "
                "its folder on PYTHONPATH"
            )


def _stand_in(found: Found, modules: Modules) -> Any:
    """Something callable with the same parameters; None when the source does not tell them."""
    node = found.node
    if node is None or getattr(node, "decorator_list", []):
        return None
    if isinstance(node, ast.ClassDef):
        return _class_stand_in(found, modules)
    return _with_signature(_signature(node), is_async=isinstance(node, ast.AsyncFunctionDef))


def _with_signature(signature: inspect.Signature, *, is_async: bool) -> Any:
    async def asynchronous() -> None: ...

    def plain() -> None: ...

    function: Any = asynchronous if is_async else plain
    function.__signature__ = signature
    return function


def _class_stand_in(found: Found, modules: Modules) -> Any:
    members: dict[str, Any] = {}
    signature = inspect.Signature()
    for part in reversed(list(_line_of_classes(found, modules))):
        node = part.node
        if not isinstance(node, ast.ClassDef) or node.decorator_list or node.keywords:
            return None
        for item in node.body:
            if isinstance(item, ast.Assign):
                members |= {name.id: None for name in item.targets if isinstance(name, ast.Name)}
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                members[item.name] = None
                if item.name in ("__init__", "__new__"):
                    signature = _signature(item, skip=1)
    assert isinstance(found.node, ast.ClassDef)
    return type(found.node.name, (), {**members, "__signature__": signature})


def _line_of_classes(found: Found, modules: Modules) -> Iterator[Found]:
    """The class and its bases, nearest first; one without a node cannot be read."""
    yield found
    assert isinstance(found.node, ast.ClassDef)
    for base in found.node.bases:
        name = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(name, ast.Name) and name.id in _EMPTY_BASES:
            continue
        if not isinstance(name, ast.Name):
            yield Found(found.module, None)
            continue
        try:
            parent = modules.find(found.module, name.id)
        except (ConfigError, ModuleNotFoundError, SyntaxError):
            parent = Found(found.module, None)  # a built-in class, or one we cannot read
        if isinstance(parent.node, ast.ClassDef):
            yield from _line_of_classes(parent, modules)
        else:
            yield Found(parent.module, None)


class _Source:
    """A default, shown as it is written."""

    def __init__(self, node: ast.expr) -> None:
        self._text = ast.unparse(node)

    def __repr__(self) -> str:
        return self._text


def _signature(node: Function, *, skip: int = 0) -> inspect.Signature:
    """The parameters of a function as they stand in its source, without the first `skip`."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    parameters: list[_Parameter] = []
    for number, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        is_first = number < len(arguments.posonlyargs)
        kind = _Parameter.POSITIONAL_ONLY if is_first else _Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(_parameter(argument, kind, default))
    parameters = parameters[skip:]
    if arguments.vararg is not None:
        parameters.append(_parameter(arguments.vararg, _Parameter.VAR_POSITIONAL, None))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(_parameter(argument, _Parameter.KEYWORD_ONLY, default))
    if arguments.kwarg is not None:
        parameters.append(_parameter(arguments.kwarg, _Parameter.VAR_KEYWORD, None))
    return inspect.Signature(parameters)


def _parameter(argument: ast.arg, kind: Any, default: ast.expr | None) -> _Parameter:
    shown = _Parameter.empty if default is None else _Source(default)
    return _Parameter(argument.arg, kind, default=shown)
