"""Modules from memory: what a program may import once it can open no file any more.

The template imports every module of the standard library that is a shared object, keeps the code of
all others, and puts one finder in place of those that look into folders.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import marshal
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

# Large, and of no use without files, processes, a network or a screen.
_LEFT_OUT = frozenset(
    (
        "test", "idlelib", "tkinter", "turtledemo", "turtle", "ensurepip", "lib2to3", "venv",
        "pydoc_data", "site-packages", "distutils", "curses", "dbm", "sqlite3", "wsgiref", "xmlrpc",
        "lib-dynload", "antigravity", "this", "__pycache__",
    )
)  # fmt: skip
_NO_EXTENSIONS = (
    "_tkinter",
    "_curses",
    "_dbm",
    "_gdbm",
    "_test",
    "_xxtest",
    "xx",
    "_sqlite3",
    "nis",
)
_PYC_HEADER = 16

Code = dict[str, tuple[bool, bytes]]  # name -> (is a package, marshalled code)


class MemoryFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads what `code` holds."""

    def __init__(self, code: Code) -> None:
        self._code = code

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module in memory, else None."""
        if fullname not in self._code:
            return None
        is_package = self._code[fullname][0]
        spec = importlib.machinery.ModuleSpec(fullname, self, is_package=is_package)
        spec.origin = f"<{fullname}>"
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """None: an ordinary module."""
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the module's code in it."""
        exec(marshal.loads(self._code[module.__name__][1]), vars(module))


def close_folders(packages: Sequence[str]) -> list[str]:
    """From now on this process imports from memory alone.

    Args:
        packages: imported now with all their modules kept, besides the standard library.

    Returns:
        The packages that could not be imported, with the reason.
    """
    missing: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _extensions():
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # built without what it needs; then a program has none either
        code = dict(_code_below(Path(sysconfig.get_path("stdlib")), ""))
        for name in packages:
            try:
                module = importlib.import_module(name)
            except ImportError as error:
                missing.append(f"{name} ({error})")
                continue
            for folder in getattr(module, "__path__", ()):
                code |= dict(_code_below(Path(folder), f"{name}."))
    in_memory = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter]
    sys.meta_path[:] = [*in_memory, MemoryFinder(code)]
    sys.path[:] = []
    sys.path_hooks[:] = []
    sys.path_importer_cache.clear()
    return missing


def _extensions() -> Iterator[str]:
    folder = Path(sysconfig.get_path("stdlib")) / "lib-dynload"
    names = {path.name.partition(".")[0] for path in folder.glob("*.so")}
    return (name for name in sorted(names) if not name.startswith(_NO_EXTENSIONS))


def _code_below(folder: Path, prefix: str) -> Iterator[tuple[str, tuple[bool, bytes]]]:
    for path in sorted(folder.iterdir()):
        stem = path.name.partition(".")[0]
        if stem in _LEFT_OUT or (prefix and stem in ("tests", "conftest")):
            continue
        if path.is_dir() and (path / "__init__.py").is_file():
            yield from _one(path / "__init__.py", prefix + stem, is_package=True)
            yield from _code_below(path, f"{prefix}{stem}.")
        elif path.suffix == ".py" and path.name != "__init__.py":
            yield from _one(path, prefix + stem, is_package=False)


def _one(path: Path, name: str, *, is_package: bool) -> Iterator[tuple[str, tuple[bool, bytes]]]:
    if name in sys.modules:
        return
    try:
        kept = Path(importlib.util.cache_from_source(str(path))).read_bytes()
    except OSError:
        kept = b""
    if kept.startswith(importlib.util.MAGIC_NUMBER):
        yield name, (is_package, kept[_PYC_HEADER:])
        return
    try:
        code = compile(path.read_bytes(), f"<{name}>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return  # a template or a test of another version
    yield name, (is_package, marshal.dumps(code))
