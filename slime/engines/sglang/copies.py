"""What a model's `load_weights` does to a bucket, recorded once and repeated afterwards.

Finding out where thousands of tensors belong takes SGLang far longer than copying them. When all that
`load_weights` did was to copy parts of the bucket into the model, later buckets of the same tensors are
copied to the same places.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slime.engines.checksum import checksums
from slime.engines.sglang.layout import Layout
from slime.engines.strips import copy_all

logger = logging.getLogger(__name__)

_COPY = torch.ops.aten.copy_.default
_WORD = torch.int64
_FILLS = {torch.ops.aten.fill_.Scalar: 1, torch.ops.aten.zero_.default: None}


class Copies:
    """Loads buckets into a model, by its own `load_weights` until that is known to be copies only."""

    def __init__(self) -> None:
        self._plans: dict[int, tuple[Layout, _Plan | None]] = {}
        self._places: tuple[int, ...] = ()

    def begin(self, model: torch.nn.Module) -> None:
        """Another sync: forget everything if the model's parameters are elsewhere now."""
        places = tuple(parameter.data_ptr() for parameter in model.parameters())
        if places != self._places:
            self._plans.clear()
            self._places = places

    def load(self, model: Any, number: int, layout: Layout, flat: Tensor) -> None:
        """Load bucket `number` of a sync.

        Args:
            flat: [num_bytes] uint8, the bucket.
        """
        known, plan = self._plans.get(number, (None, None))
        if known == layout:
            if plan is not None:
                plan.run(flat)
            else:
                _load(model, layout, flat)
            return
        with _Recorder(flat) as recorder:
            _load(model, layout, flat)
        plan = recorder.plan()
        if plan is not None and not plan.does_the_same(flat):
            logger.warning("slime: copies of bucket %d do not give what load_weights gives", number)
            plan = None
            _load(model, layout, flat)
        self._plans[number] = (layout, plan)


def _load(model: Any, layout: Layout, flat: Tensor) -> None:
    model.load_weights(list(zip(layout.names, layout.tensors(flat), strict=True)))


@dataclass(frozen=True)
class _Copy:
    """From `size` numbers of `dtype` at `offset` bytes of the bucket, with these strides, to `target`."""

    target: Tensor
    offset: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it is a copy of bytes, without gaps on either side."""
        dense = torch.empty(self.size, device="meta").stride()
        return (
            self.dtype == self.target.dtype
            and self.size == tuple(self.target.shape)
            and self.stride == dense == self.target.stride()
        )

    def in_words(self) -> "_Copy":
        """The same bytes in numbers of 64 bits, where it is made of such: with gaps, a card copies number by number."""
        target, itemsize = self.target, self.dtype.itemsize
        size, stride, steps = self.size, self.stride, target.stride()
        if self.dtype != target.dtype or size != tuple(target.shape) or not size:
            return self
        counts = size[-1], *stride[:-1], *steps[:-1]
        places = self.offset, target.data_ptr(), *(count * itemsize for count in counts)
        if (stride[-1], steps[-1]) != (1, 1) or any(place % _WORD.itemsize for place in places):
            return self
        each = _WORD.itemsize // itemsize
        size = *size[:-1], size[-1] // each
        stride = *(step // each for step in stride[:-1]), 1
        return _Copy(target.view(_WORD), self.offset, _WORD, size, stride)

    @property
    def kind(self) -> tuple[Any, ...]:
        """The same for copies that differ only in where they are, inside of one parameter."""
        target = self.target
        memory = target.untyped_storage().data_ptr()
        return (
            self.dtype,
            self.size,
            self.stride,
            target.dtype,
            target.shape,
            target.stride(),
            memory,
        )


@dataclass
class _Series:
    """Copies of a kind, each as far from the one before as that from its own, in the bucket and in memory."""

    first: _Copy
    count: int = 1
    step: tuple[int, int] = (0, 0)

    def takes(self, copy: _Copy) -> bool:
        """Whether `copy`, of the kind, is the next; then it is in."""
        first, count = self.first, self.count
        source = copy.offset - first.offset
        target = copy.target.data_ptr() - first.target.data_ptr()
        sizes = first.dtype.itemsize, first.target.dtype.itemsize
        step = source // count, target // count
        is_next = (source, target) == (step[0] * count, step[1] * count)
        is_same = step == self.step if count > 1 else min(step) > 0
        if not is_next or not is_same or step[0] % sizes[0] or step[1] % sizes[1]:
            return False
        self.count, self.step = count + 1, step
        return True

    def as_one(self) -> _Copy:
        """All of them, [count, ...]."""
        first, count = self.first, self.count
        if count == 1:
            return first
        target = first.target
        steps = self.step[0] // first.dtype.itemsize, self.step[1] // target.dtype.itemsize
        all_targets = target.as_strided(
            (count, *target.shape), (steps[1], *target.stride()), target.storage_offset()
        )
        size, stride = (count, *first.size), (steps[0], *first.stride)
        return _Copy(all_targets, first.offset, first.dtype, size, stride)


def _merged(copies: Sequence[_Copy]) -> list[_Copy]:
    """The same in fewer copies: those of the experts of a layer are a few series."""
    series: list[_Series] = []
    latest: dict[tuple[Any, ...], _Series] = {}
    for copy in copies:
        kind = copy.kind
        is_whole = copy.size == tuple(copy.target.shape)  # not one row for many
        if not is_whole or kind not in latest or not latest[kind].takes(copy):
            latest[kind] = _Series(copy)
            series.append(latest[kind])
    return [one.as_one() for one in series]


class _Plan:
    """Copies out of a bucket, and fills with constants."""

    def __init__(self, copies: Sequence[_Copy], fills: Sequence[tuple[Tensor, Any]]) -> None:
        merged = _merged(copies)
        self._plain = [copy for copy in merged if copy.is_plain]
        self._others = [copy.in_words() for copy in merged if not copy.is_plain]
        self._targets = [copy.target for copy in self._plain]
        self._fills = fills

    @torch.no_grad()
    def run(self, flat: Tensor) -> None:
        """Do them all with this bucket."""
        for target, value in self._fills:
            target.fill_(value)
        words: dict[torch.dtype, Tensor] = {}
        copy_all(self._targets, [_source(copy, flat, words) for copy in self._plain])
        for copy in self._others:
            copy.target.copy_(_source(copy, flat, words))

    def does_the_same(self, flat: Tensor) -> bool:
        """Whether running it brings back, in all that it writes, the bits that are there now."""
        targets = [*self._targets, *(copy.target for copy in self._others)]
        targets += [target for target, _ in self._fills]
        before = checksums(targets)
        with torch.no_grad():
            for target in targets:
                target.zero_()
        self.run(flat)
        return checksums(targets) == before


def _source(copy: _Copy, flat: Tensor, words: dict[torch.dtype, Tensor]) -> Tensor:
    """What is copied, of this bucket; `words` are views of it by dtype."""
    size = copy.dtype.itemsize
    base = words.get(copy.dtype)
    if base is None:
        base = words[copy.dtype] = flat[: flat.numel() // size * size].view(copy.dtype)
    place = base.storage_offset() + copy.offset // size
    return base.as_strided(copy.size, copy.stride, place)


class _Recorder(TorchDispatchMode):
    """Sees every operation on tensors; `plan` is None unless all were views, copies of a bucket and fills."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._first, self._end = flat.data_ptr(), flat.data_ptr() + flat.numel()
        self._copies: list[_Copy] = []
        self._fills: list[tuple[Tensor, Any]] = []
        self._other: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _COPY and self._has(args[1]) and not self._has(args[0]):
            target, source = args[0].detach(), args[1]
            if target.numel():
                place = source.data_ptr() - self._first
                size, stride = tuple(source.shape), tuple(source.stride())
                self._copies.append(_Copy(target, place, source.dtype, size, stride))
        elif func in _FILLS and not self._has(args[0]):
            value = 0 if _FILLS[func] is None else args[1]
            if args[0].numel():
                self._fills.append((args[0].detach(), value))
        elif not func.is_view and self._other is None:
            self._other = str(func)
        return result

    def plan(self) -> _Plan | None:
        """How to do it again; None when that cannot be known."""
        if self._other is not None:
            logger.info("slime: load_weights does more than copy: %s", self._other)
            return None
        return _Plan(self._copies, self._fills)

    def _has(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the bucket."""
        return self._first <= tensor.data_ptr() < self._end
