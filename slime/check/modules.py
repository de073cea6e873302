"""Source files of modules, found and parsed without running them."""

import ast
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from slime.errors import ConfigError
from slime.plugins import nearest

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Definition = Function | ast.ClassDef
_DEEPEST = 20  # names that lead to names: more is a circle


@dataclass(frozen=True)
class Module:
    """A module that was read, not run; `tree` is None when it has no Python source."""

    name: str
    path: Path | None
    tree: ast.Module | None
    is_package: bool


@dataclass(frozen=True)
class Found:
    """What a name leads to: its definition, or None when only running the module would tell."""

    module: Module
    node: Definition | None


class Modules:
    """Finds modules as a run would: first in `folders`, then where Python looks.

    Args:
        folders: searched before `sys.path`; of the script that is run.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        importlib.invalidate_caches()
        self._folders = list(folders)
        self._read: dict[str, Module] = {}

    def read(self, name: str) -> Module:
        """The module of this dotted name; no module is imported, its packages neither.

        Raises:
            ModuleNotFoundError: `name` of the error is the part that is missing.
            SyntaxError: it is no Python.
        """
        if name not in self._read:
            self._read[name] = self._parse(name, self._spec(name))
        return self._read[name]

    def exists(self, name: str) -> bool:
        """Whether there is a module of this dotted name."""
        try:
            self._spec(name)
        except ModuleNotFoundError:
            return False
        return True

    def find(self, module: Module, name: str, depth: int = 0) -> Found:
        """What `module.name` leads to, through imports and other names.

        Raises:
            ConfigError: the module has no such name.
            ModuleNotFoundError, SyntaxError: of a module the name comes from.
        """
        if module.tree is None or depth > _DEEPEST:
            return Found(module, None)
        bindings = [item for item in _bindings(module.tree) if item.name == name]
        if bindings:
            return self._follow(module, bindings[-1], depth)
        for star in _star_imports(module.tree):
            other = self.read(_absolute(module, star))
            if other.tree is None:
                return Found(other, None)
            if any(item.name == name for item in _bindings(other.tree)):
                return self.find(other, name, depth + 1)
        names = [item.name for item in _bindings(module.tree)]
        if "__getattr__" in names:
            return Found(module, None)
        if module.is_package and self.exists(f"{module.name}.{name}"):
            return Found(module, None)
        public = [word for word in names if not word.startswith("_")]
        raise ConfigError(f"module {module.name!r} has no {name!r}{nearest(name, public)}")

    def _follow(self, module: Module, binding: "_Binding", depth: int) -> Found:
        node = binding.node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            return Found(module, node)
        if isinstance(node, ast.Name):
            return self.find(module, node.id, depth + 1)
        if isinstance(node, ast.ImportFrom):
            other = self.read(_absolute(module, node))
            return self.find(other, binding.source or binding.name, depth + 1)
        return Found(module, None)

    def _spec(self, name: str) -> ModuleSpec:
        top, *rest = name.split(".")
        spec = self._top_spec(top)
        known = top
        for part in rest:
            known += f".{part}"
            folders = spec.submodule_search_locations if spec is not None else None
            spec = PathFinder.find_spec(known, list(folders)) if folders else None
            if spec is None:
                break
        if spec is None:
            raise ModuleNotFoundError(f"No module named {known!r}", name=known)
        return spec

    def _top_spec(self, name: str) -> ModuleSpec | None:
        """Of a module without a package: finding it runs nothing."""
        spec = PathFinder.find_spec(name, self._folders)
        for finder in sys.meta_path:
            if spec is not None:
                break
            spec = finder.find_spec(name, None)
        return spec

    def _parse(self, name: str, spec: ModuleSpec) -> Module:
        is_package = spec.submodule_search_locations is not None
        if spec.origin is None or not spec.origin.endswith(".py"):
            return Module(name, None, None, is_package)
        path = Path(spec.origin)
        return Module(name, path, ast.parse(path.read_bytes(), str(path)), is_package)


def top_level_imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(module, line) of what must be there for the module to be imported at all.

    Imports inside `if` and `try` may be meant to fail.
    """
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module, node.lineno


@dataclass(frozen=True)
class _Binding:
    """A statement that gives `name` a meaning; `source` is the name it has where it comes from."""

    name: str
    node: ast.AST
    source: str | None = None


def _bindings(tree: ast.Module) -> Iterator[_Binding]:
    for node in _statements(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield _Binding(node.name, node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield _Binding(alias.asname or alias.name.partition(".")[0], node)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield _Binding(alias.asname or alias.name, node, alias.name)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield from _assigned(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield from _assigned(node.target, node.value)


def _assigned(target: ast.expr, value: ast.expr) -> Iterator[_Binding]:
    if isinstance(target, ast.Name):
        yield _Binding(target.id, value)
    elif isinstance(target, ast.Tuple | ast.List):
        for item in target.elts:
            if isinstance(item, ast.Name):
                yield _Binding(item.id, target)  # one of several: which, only running tells


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements of the module's own level, those inside `if`, `try`, `with`, loops too."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _star_imports(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield node


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """The module that `from ... import` names, without dots in front."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    keep = len(parts) - node.level + (1 if module.is_package else 0)
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])
