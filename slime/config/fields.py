"""flag(): one dataclass field is one command-line flag and one row of docs/flags.md."""

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, Union, cast, get_args, get_origin

Kind = Literal["value", "true", "false", "const", "negatable", "append", "extend"]
Owner = Literal["slime", "megatron", "sglang", "router"]
Convert = Callable[[str], Any]

_METADATA_KEY = "slime.flag"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One flag of the command line, whoever owns it.

    Attributes:
        owner: who reads the value; Megatron's flags that slime types belong to slime.
        names: spellings, the documented one first: `--eps-clip`.
        negations: spellings that set False: `--no-offload-train`.
        dest: `eps_clip`, the attribute of the config or of the owner's namespace.
        group: title in `--help`.
        kind: "value" takes words; "true", "false" and "const" take none; "negatable" has a --no-
            form; "append" and "extend" may be repeated.
        nargs: None for one word, "?", "*", "+", or an int for exactly so many.
        convert: turns one word into a value; raises ValueError when it cannot.
        type_name: of one word, for help and error messages.
        default: without the flag; also the value in docs and in the frozen flag list.
        const: what "const" sets.
        at_least, above: bound of a number.
    """

    names: tuple[str, ...]
    negations: tuple[str, ...] = ()
    dest: str
    owner: Owner = "slime"
    group: str = ""
    help: str = ""
    kind: Kind = "value"
    nargs: str | int | None = None
    choices: tuple[Any, ...] | None = None
    convert: Convert = str
    type_name: str = "str"
    default: Any = None
    const: Any = None
    at_least: float | None = None
    above: float | None = None

    @property
    def name(self) -> str:
        """The documented spelling."""
        return self.names[0]

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no word."""
        return self.kind in ("true", "false", "const", "negatable")


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What `flag()` was told; the rest of an Option follows from the field's annotation."""

    help: str
    choices: tuple[str, ...] | None
    nargs: str | int | None
    type: Convert | None
    action: Kind | None
    at_least: float | None
    above: float | None


def flag[T](
    default: T,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    nargs: str | int | None = None,
    type: Convert | None = None,
    action: Kind | None = None,
    at_least: float | None = None,
    above: float | None = None,
) -> T:
    """A dataclass field that is also a flag.

    Names, kind and type come from the field: `use_kl_loss: bool` is `--use-kl-loss`; a boolean
    whose default is True or None also gets `--no-...`; `tuple[str, ...]` takes one word or more;
    `dict` takes JSON; `Literal` gives choices.

    Args:
        default: of the field; a dict is copied for each instance.
        help: one sentence; what it does, with unit.
        choices: allowed words, where the annotation is plain `str`.
        nargs: number of words, where the annotation does not tell.
        type: converts one word, where the annotation does not tell.
        action: "append" for a flag that is given several times.
        at_least, above: bound of a number, checked by `resolve`.
    """
    told = _Told(
        help=help,
        choices=choices,
        nargs=nargs,
        type=type,
        action=action,
        at_least=at_least,
        above=above,
    )
    metadata = {_METADATA_KEY: told}
    if isinstance(default, dict):
        initial = cast(dict[str, Any], default)
        return cast(T, field(default_factory=lambda: dict(initial), metadata=metadata))
    return cast(T, field(default=default, metadata=metadata))


def options_of(section: type[Any]) -> list[Option]:
    """The flags of one section, in the order they are written; derived fields are left out."""
    title = (section.__doc__ or section.__name__).strip().splitlines()[0].rstrip(".")
    options: list[Option] = []
    for item in fields(section):
        told = item.metadata.get(_METADATA_KEY)
        if isinstance(told, _Told):
            options.append(_option(item, told, title))
    return options


def parse_json(word: str) -> Any:
    """The JSON value in `word`.

    Raises:
        ValueError: it is no JSON.
    """
    return json.loads(word)


def parse_bool(word: str) -> bool:
    """True or False from their usual spellings.

    Raises:
        ValueError: neither of them.
    """
    lowered = word.lower()
    if lowered in ("true", "yes", "on", "1"):
        return True
    if lowered in ("false", "no", "off", "0"):
        return False
    raise ValueError(f"{word!r} is neither true nor false")


def parse_count(word: str) -> int:
    """A whole number, written out or with a suffix: `25.6k` is 25600, `1Ki` is 1024.

    Raises:
        ValueError: no number, or not a whole one.
    """
    number, size = word, 1
    for suffix, size_of_suffix in _COUNT_SUFFIXES.items():
        if word.endswith(suffix):
            number, size = word.removesuffix(suffix), size_of_suffix
            break
    try:
        count = Decimal(number) * size
    except InvalidOperation:
        raise ValueError(f"{word!r} is no number") from None
    if not count.is_finite() or count != int(count):
        raise ValueError(f"{word!r} is no whole number")
    return int(count)


_COUNT_SUFFIXES = {
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
}
CONVERTERS: dict[str, Convert] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": parse_bool,
    "json": parse_json,
    "human_readable_int": parse_count,  # SGLang's name for it
}
_TYPE_NAMES: dict[Any, str] = {int: "int", float: "float", str: "str", bool: "bool", dict: "json"}


def _option(item: Field[Any], told: _Told, title: str) -> Option:
    base, nargs, choices = _unwrap(item.type)
    default = item.default
    if default is MISSING and item.default_factory is not MISSING:
        default = item.default_factory()
    if told.action is not None:
        kind: Kind = told.action
        nargs = None
    elif base is bool:
        kind = "true" if default is False else "negatable"
    else:
        kind = "value"
    name = item.name.replace("_", "-")
    type_name = _TYPE_NAMES[base]
    return Option(
        names=(f"--{name}",),
        negations=(f"--no-{name}",) if kind == "negatable" else (),
        dest=item.name,
        group=title,
        help=told.help,
        kind=kind,
        nargs=nargs if told.nargs is None else told.nargs,
        choices=choices if told.choices is None else told.choices,
        convert=told.type or CONVERTERS[type_name],
        type_name=type_name,
        default=default,
        at_least=told.at_least,
        above=told.above,
    )


def _unwrap(annotation: Any) -> tuple[Any, str | None, tuple[str, ...] | None]:
    """(type of one word, nargs, choices) of an annotation such as `tuple[int, ...] | None`."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"a flag has one type besides None, found {annotation}")
        return _unwrap(inner[0])
    if origin is tuple:
        base, _, choices = _unwrap(get_args(annotation)[0])
        return base, "+", choices
    if origin is Literal:
        return str, None, tuple(str(choice) for choice in get_args(annotation))
    if origin in (dict, Mapping):
        return dict, None, None
    return annotation, None, None
