"""Bins of numbers: first-fit under a cap, and Karmarkar-Karp balance. Pure Python."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field


def first_fit(lengths: Sequence[int], cap: int) -> list[list[int]]:
    """Bins of positions whose lengths add up to at most `cap`; a longer item sits alone.

    Every item goes to the first bin with room, in the order given; O(items x bins).
    """
    bins: list[list[int]] = []
    loads: list[int] = []
    for position, length in enumerate(lengths):
        for number, load in enumerate(loads):
            if load + length <= cap:
                bins[number].append(position)
                loads[number] += length
                break
        else:
            bins.append([position])
            loads.append(length)
    return bins


def karmarkar_karp(
    weights: Sequence[float], num_bins: int, *, equal_count: bool = False
) -> list[list[int]]:
    """`num_bins` lists of positions whose weights add up to nearly the same.

    Largest differencing: keep partial solutions, each a tuple of bins; always merge the two with
    the largest spread, the heavy bins of the one with the light bins of the other.

    Args:
        weights: not negative.
        num_bins: bins; some stay empty if there are fewer items.
        equal_count: every bin gets the same number of items.

    Raises:
        ValueError: `num_bins` < 1, or `equal_count` and the number of items is no multiple of it.

    Source: Karmarkar and Karp 1982, "The differencing method of set partitioning", UCB/CSD 82/113.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins {num_bins}: expected at least 1")
    if equal_count and len(weights) % num_bins:
        raise ValueError(f"{len(weights)} items do not split evenly into {num_bins} bins")
    # Heaviest first; ties by position, so that every rank and every run finds the same answer.
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    per_start = num_bins if equal_count else 1
    starts = [order[i : i + per_start] for i in range(0, len(order), per_start)]
    heap = [_start(items, weights, num_bins, number) for number, items in enumerate(starts)]
    heapq.heapify(heap)
    while len(heap) > 1:
        heapq.heappush(heap, _merge(heapq.heappop(heap), heapq.heappop(heap)))
    return [items for _, items in heap[0].bins] if heap else [[] for _ in range(num_bins)]


def split_largest(
    bins: Sequence[Sequence[int]], lengths: Sequence[int], num_bins: int
) -> list[list[int]]:
    """At least as many bins as given, up to `num_bins`: the heaviest bin that can be is cut in two.

    Neighbours stay together: samples of one group have their prompt in common, and a trainer may
    compute it once.

    A bin of one item cannot be cut, so fewer than `num_bins` come back if there are too few items.
    """
    # (-load, age, items): the heap hands out the heaviest first, the oldest among equals.
    divisible = [(-_load(b, lengths), n, list(b)) for n, b in enumerate(bins) if len(b) > 1]
    done = [(n, list(b)) for n, b in enumerate(bins) if len(b) <= 1]
    heapq.heapify(divisible)
    age = len(bins)
    while divisible and len(divisible) + len(done) < num_bins:
        _, number, items = heapq.heappop(divisible)
        cut = _middle([lengths[i] for i in items])
        for label, part in ((number, items[:cut]), (age, items[cut:])):
            if len(part) > 1:
                heapq.heappush(divisible, (-_load(part, lengths), label, part))
            else:
                done.append((label, part))
        age += 1
    done += [(number, items) for _, number, items in divisible]
    return [items for _, items in sorted(done)]


def _middle(lengths: Sequence[int]) -> int:
    """Where to cut a list of at least two so that the heavier part is as light as can be."""
    total, before, best, cut = sum(lengths), 0, math.inf, 1
    for position, length in enumerate(lengths[:-1], start=1):
        before += length
        if max(before, total - before) < best:
            best, cut = max(before, total - before), position
    return cut


def _load(items: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in items)


@dataclass(order=True)
class _Partial:
    """A partial solution: its bins, lightest first. Compared by spread, largest first, and age."""

    negative_spread: float
    number: int
    bins: list[tuple[float, list[int]]] = field(compare=False)


def _start(items: list[int], weights: Sequence[float], num_bins: int, number: int) -> _Partial:
    bins = [(float(weights[i]), [i]) for i in reversed(items)]
    bins = [(0.0, list[int]()) for _ in range(num_bins - len(items))] + bins
    return _Partial(bins[0][0] - bins[-1][0], number, bins)


def _merge(first: _Partial, second: _Partial) -> _Partial:
    pairs = zip(first.bins, reversed(second.bins), strict=True)
    bins = sorted(
        ((a_load + b_load, a + b) for (a_load, a), (b_load, b) in pairs),
        key=lambda entry: (entry[0], entry[1]),
    )
    return _Partial(bins[0][0] - bins[-1][0], min(first.number, second.number), bins)
