"""Write slime/config/tables/*.json: the options of Megatron, SGLang's server and the router.

    python tools/record_flag_tables.py megatron router
    python tools/record_flag_tables.py sglang --source DIR --version 0.5.17

Megatron and the router are read from the installed packages. So is SGLang where it is installed;
elsewhere give the folder of an unpacked wheel: its `server_args.py` then runs with stand-ins for
what it imports, which is enough to build its parser.
"""

import argparse
import ast
import importlib.abc
import importlib.machinery
import os
import sys
import types
from importlib import metadata
from pathlib import Path
from unittest.mock import MagicMock

from slime.config.recorded import Row, describe_parser, write_table

TABLES = Path(__file__).resolve().parent.parent / "slime" / "config" / "tables"


def megatron_rows() -> list[Row]:
    """The options of Megatron's own parser; importing it takes some seconds."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return describe_parser(parser)


def router_rows() -> list[Row]:
    """The options of `smg launch`."""
    from smg.router_args import RouterArgs

    parser = argparse.ArgumentParser(allow_abbrev=False)
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    return describe_parser(parser)


def sglang_rows() -> list[Row]:
    """The options of SGLang's ServerArgs; `sglang` must be importable."""
    from sglang.srt.server_args import ServerArgs  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    return describe_parser(parser)


class _StandIn(types.ModuleType):
    """A module in which every name exists."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=name)
        value.__name__ = name
        setattr(self, name, value)
        return value


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports all of `sglang` as stand-ins, except the modules that describe its options."""

    REAL = (
        "sglang.srt.server_args",
        "sglang.srt.arg_groups.arg_utils",
        "sglang.srt.arg_groups.argparse_actions",
        "sglang.srt.environ",
        "sglang.srt.model_executor.cuda_graph_config",
    )

    def __init__(self, source: Path) -> None:
        self.source = source

    def find_spec(
        self, name: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "sglang" or name in self.REAL:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _StandIn(spec.name)
        module.__path__ = [str(self.source / spec.name.replace(".", "/"))]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


# Their choices come from registries that the stand-ins do not have: read from the source below.
_REGISTRIES = {
    "reasoning_parser": ("parser/reasoning_parser.py", "DetectorMap"),
    "tool_call_parser": ("function_call/function_call_parser.py", "ToolCallParserEnum"),
}


def sglang_rows_from_source(source: Path) -> list[Row]:
    """The same rows without SGLang's dependencies, from an unpacked wheel."""
    sys.meta_path.insert(0, _StandInFinder(source))
    sys.path.insert(0, str(source))
    rows = sglang_rows()
    for row in rows:
        if row["dest"] in _REGISTRIES:
            file, name = _REGISTRIES[row["dest"]]
            row["choices"] = ["auto", *_dict_keys(source / "sglang" / "srt" / file, name)]
            row["help"] = row["help"].partition(" Options include")[0]
        elif "choices" in row and any("Mock" in str(choice) for choice in row["choices"]):
            del row["choices"]
        row["help"] = row.get("help", "").partition(" MagicMock is a subclass")[0]
    return rows


def _dict_keys(file: Path, name: str) -> list[str]:
    """Keys of the dict literal that `file` assigns to `name`."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            if isinstance(value, ast.Dict):
                return [str(key.value) for key in value.keys if isinstance(key, ast.Constant)]
    raise SystemExit(f"{file} assigns no dict to {name}")


def main() -> None:
    """Record the tables named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tables", nargs="+", choices=["megatron", "sglang", "router"])
    parser.add_argument("--source", type=Path, help="Folder of an unpacked sglang wheel.")
    parser.add_argument("--version", help="Version of that wheel.")
    args = parser.parse_args()
    if "megatron" in args.tables:
        path = str(TABLES / "megatron.json")
        version = metadata.version("megatron-core")
        write_table(path, "megatron-core", version, megatron_rows())
    if "router" in args.tables:
        write_table(str(TABLES / "router.json"), "smg", metadata.version("smg"), router_rows())
    if "sglang" in args.tables:
        rows = sglang_rows_from_source(args.source) if args.source else sglang_rows()
        version = args.version or metadata.version("sglang")
        write_table(str(TABLES / "sglang.json"), "sglang", version, rows)


if __name__ == "__main__":
    main()
