"""Stand-in for torchvision: each module and name can be imported, and nothing can be called.

SGLang and the processors of transformers import it at start; a text model calls none of it.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

__version__ = "0.26.0"  # the release whose names these are


class _Named(type):
    """A class of any name; its attributes are such classes too, as members of an enum are read."""

    def __getattr__(cls, name: str) -> "_Named":
        return _named(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"torchvision's {cls.__name__} has no stand-in on the CPU")


def _named(name: str) -> _Named:
    if name.startswith("__"):
        raise AttributeError(name)
    return type.__new__(_Named, name, (), {})


class _AnySubmodule(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _named  # type: ignore[method-assign]


sys.meta_path.insert(0, _AnySubmodule())
__getattr__ = _named
