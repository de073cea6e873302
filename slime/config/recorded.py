"""Recorded tables of other programs' options: read here, without importing those programs."""

import argparse
import enum
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, cast

from slime.config.fields import CONVERTERS, Kind, Option

TableName = Literal["megatron", "sglang", "router"]
Row = dict[str, Any]

_PREFIXES: dict[TableName, str] = {"megatron": "", "sglang": "sglang-", "router": "router-"}


@dataclass(frozen=True)
class RecordedTable:
    """The options of one program as they were when `tools/record_flag_tables.py` ran.

    Attributes:
        package: where they came from, such as `megatron-core`.
        version: of that package.
        options: with slime's prefix in their names.
    """

    package: str
    version: str
    options: tuple[Option, ...]


@functools.cache
def load_table(name: TableName) -> RecordedTable:
    """The recorded options of Megatron, SGLang's server or the router."""
    text = resources.files("slime.config").joinpath(f"tables/{name}.json").read_text("utf-8")
    content = json.loads(text)
    options = tuple(_option_of_row(row, name) for row in content["options"])
    return RecordedTable(content["package"], content["version"], options)


def describe_parser(parser: argparse.ArgumentParser) -> list[Row]:
    """One JSON-able row per option of `parser`, in order; what is the default is left out."""
    groups = {
        id(action): group.title or ""
        for group in parser._action_groups  # pyright: ignore[reportPrivateUsage]
        for action in group._group_actions  # pyright: ignore[reportPrivateUsage]
    }
    rows: list[Row] = []
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        if action.option_strings and action.dest != "help":
            rows.append(_row_of_action(action, groups[id(action)]))
    return rows


def write_table(path: str, package: str, version: str, rows: list[Row]) -> None:
    """Write `rows` with one option per line, so that a new version reads as a diff."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = f'{{"package": "{package}", "version": "{version}", "options": [\n'
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{head}{lines}\n]}}\n")


def _row_of_action(action: argparse.Action, group: str) -> Row:
    kind = _kind_of(action)
    row: Row = {"flags": list(action.option_strings), "dest": action.dest, "kind": kind}
    if kind in ("value", "append", "extend"):
        row["type"] = _type_name(action.type)
    optional = {
        "group": group,
        "nargs": action.nargs if kind in ("value", "append", "extend") else None,
        "choices": [_plain(choice) for choice in action.choices] if action.choices else None,
        "default": _plain(action.default),
        "const": _plain(getattr(action, "const_value", action.const)) if kind == "const" else None,
        "help": _help_text(action.help),
    }
    kept = {key: value for key, value in optional.items() if value is not None}
    return row | {key: value for key, value in kept.items() if value != "" or key == "default"}


_KINDS: dict[str, Kind] = {
    "_StoreTrueAction": "true",
    "_StoreFalseAction": "false",
    "_StoreConstAction": "const",
    "_AppendAction": "append",
    "_ExtendAction": "extend",
    "BooleanOptionalAction": "negatable",
    "DeprecatedStoreConstAction": "const",
}


def _kind_of(action: argparse.Action) -> Kind:
    kind = _KINDS.get(type(action).__name__)
    if kind is not None:
        return kind
    return "true" if action.nargs == 0 else "value"


def _type_name(converter: Any) -> str:
    if converter is None:
        return "str"
    name = cast(str, getattr(converter, "__name__", str(converter)))
    return {"loads": "json", "json_list_type": "json", "_non_negative_int": "int"}.get(name, name)


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it; enums by name, because Megatron's parser reads names."""
    if value is argparse.SUPPRESS:
        return None
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast(list[Any], value)]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return cast(dict[str, Any], value) if isinstance(value, dict) else str(value)


def _help_text(text: str | None) -> str:
    return "" if text is None or text == argparse.SUPPRESS else " ".join(text.split())


def _option_of_row(row: Row, name: TableName) -> Option:
    prefix = _PREFIXES[name]
    flags = tuple(f"--{prefix}{flag.removeprefix('--')}" for flag in row["flags"])
    kind: Kind = row["kind"]
    negations = tuple(flag for flag in flags if flag.startswith(f"--{prefix}no-"))
    if kind != "negatable":
        negations = ()
    type_name = row.get("type", "bool")
    return Option(
        names=tuple(flag for flag in flags if flag not in negations),
        negations=negations,
        dest=row["dest"],
        owner=name,
        group=row.get("group", ""),
        help=row.get("help", ""),
        kind=kind,
        nargs=row.get("nargs"),
        choices=tuple(row["choices"]) if "choices" in row else None,
        convert=_converter(type_name),
        type_name=type_name,
        default=row.get("default"),
        const=row.get("const"),
    )


def _converter(type_name: str) -> Callable[[str], Any]:
    # A type only its owner knows stays the word it was; the owner's own parser converts it.
    return CONVERTERS.get(type_name, str)
