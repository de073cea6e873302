"""Packed: the numbers of a long list in an array; and the attribute that is the list again to whoever reads it.

4,096 ids and as many log-probs are 325 KiB as lists of Python's numbers, which its garbage collector walks over again
and again; as arrays they are 32 KiB, which it need not look at.
"""

from array import array
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any, Self, cast

import numpy as np

# Below this many numbers a list is as good: packing has a price for each list.
LEAST = 512

Row = Sequence[Any] | np.ndarray[Any, Any]


class Packed:
    """The numbers of one list, exactly. Not to be changed: copies of a sample share it.

    Attributes:
        array: [n] int32 or int64 for whole numbers, fp32 for floats when that holds every bit of them, else fp64.
    """

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    @classmethod
    def of(cls, row: list[Any]) -> Self | None:
        """`row` packed; None where it would not come back as it is: mixed or other types, huge ids."""
        types = set(map(type, row))
        if types == {int}:
            try:
                whole = np.frombuffer(array("q", row), dtype=np.int64)
            except OverflowError:
                return None
            narrow = whole.astype(np.int32)
            return cls(narrow if np.array_equal(narrow, whole) else whole)
        if types == {float}:
            exact = np.frombuffer(array("d", row), dtype=np.float64)
            with np.errstate(over="ignore"):
                half = exact.astype(np.float32)
            # By their bits: nan is equal to nothing, and -0.0 to 0.0.
            is_same = np.array_equal(half.astype(np.float64).view(np.int64), exact.view(np.int64))
            return cls(half if is_same else exact)
        return None

    def tolist(self) -> list[Any]:
        """The list, made anew."""
        return self.array.tolist()

    def __len__(self) -> int:
        return len(self.array)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        return repr(self.tolist())


class PackableList:
    """The attribute of a class whose value may be a `Packed`: reading it makes it a list again, for good.

    Whoever reads a list may change it in place, so from then on the list is the truth.

    Args:
        default: of the class itself, where the attribute has one.
    """

    def __init__(self, name: str, default: Any = MISSING) -> None:
        self._name = name
        self._default = default

    def __get__(self, instance: object, owner: type[Any] | None = None) -> Any:
        own: dict[str, Any] = {} if instance is None else vars(instance)
        value = own.get(self._name, self._default)
        if value is MISSING:
            raise AttributeError(self._name)
        if type(value) is Packed:
            value = own[self._name] = value.tolist()
        return value

    def __set__(self, instance: object, value: Any) -> None:
        vars(instance)[self._name] = value


def pack(instance: object, names: Sequence[str]) -> None:
    """Pack those attributes of `instance` that are long lists of numbers."""
    own = vars(instance)
    for name in names:
        value: Any = own.get(name)
        if type(value) is not list or len(cast(list[Any], value)) < LEAST:
            continue
        if (packed := Packed.of(cast(list[Any], value))) is not None:
            own[name] = packed


def stored(instance: object, name: str) -> Any:
    """The attribute's value as it lies there, without making it a list: of a packed one the array."""
    value: Any = vars(instance)[name]
    return value.array if type(value) is Packed else value


def row_sum(row: Row) -> float:
    """Sum of a row, an array or a list."""
    return row.sum().item() if isinstance(row, np.ndarray) else sum(row)
