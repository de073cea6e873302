"""Context parallelism: which tokens a rank holds, what they attend to, and its gradients."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from slime.backends.megatron.packs.context import (
    ContextPlan,
    context_plan,
    local_tokens,
    sum_over_ranks,
)

LENGTHS = [12, 24, 12, 36]  # multiples of 2 x 1, 2 x 2 and 2 x 3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FakeGroup:
    """A fake process group: a place in it, and no way to talk."""

    place: int
    count: int

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return self.count


def plan_of(rank: int, size: int) -> ContextPlan:
    group: Any = FakeGroup(rank, size)
    return context_plan(LENGTHS, group, CPU)


def on_ranks[T](size: int, work: Callable[[int, Any], T]) -> list[T]:
    """`work(rank, group)` on threads that are ranks of one gloo group."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]

    def start(rank: int) -> T:
        return work(rank, dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=30)))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(start, range(size)))


def held_by_all(size: int) -> np.ndarray[Any, Any]:
    """[cp x T] position in the whole stream of each row that an all-gather gives."""
    return np.concatenate([local_tokens(LENGTHS, rank, size) for rank in range(size)])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_together_hold_every_token_once_and_equally_many(size: int) -> None:
    parts = [local_tokens(LENGTHS, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(sum(LENGTHS)))
    assert {len(part) for part in parts} == {sum(LENGTHS) // size}


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_have_the_same_number_of_pairs_to_attend_to(size: int) -> None:
    """Queries times keys of the spans, which is what attention costs."""
    work = [sum(q * k for q, k in plan_of(rank, size).lengths) for rank in range(size)]
    assert len(set(work)) == 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_span_is_a_chunk_with_the_prefix_of_its_sequence(size: int) -> None:
    everywhere = held_by_all(size)
    starts = np.cumsum(LENGTHS) - LENGTHS
    for rank in range(size):
        plan, mine = plan_of(rank, size), local_tokens(LENGTHS, rank, size)
        keys = everywhere[plan.gather.numpy()]
        queries_at, keys_at = plan.cu_queries.tolist(), plan.cu_keys.tolist()
        assert queries_at[-1] == len(mine)
        assert keys_at[-1] == len(keys)
        for span, (num_queries, num_keys) in enumerate(plan.lengths):
            queries = mine[queries_at[span] : queries_at[span + 1]]
            prefix = keys[keys_at[span] : keys_at[span + 1]]
            assert (len(queries), len(prefix)) == (num_queries, num_keys)
            start = max(s for s in starts if s <= queries[0])
            # Bottom-right causal attention: the last query sees the last key.
            assert prefix.tolist() == list(range(start, queries[-1] + 1))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_uses_list_every_place_of_every_key(size: int) -> None:
    for rank in range(size):
        plan = plan_of(rank, size)
        num_keys = len(plan.gather)
        places: dict[int, set[int]] = {}
        for place, row in enumerate(plan.gather.tolist()):
            places.setdefault(row, set()).add(place)
        for row, pair in enumerate(zip(*(use.tolist() for use in plan.uses), strict=True)):
            assert {place for place in pair if place != num_keys} == places.get(row, set())
        assert sum(len(used) for used in places.values()) == num_keys


@pytest.mark.parametrize("size", [2, 3])
def test_gathered_keys_and_their_gradient_are_those_of_plain_indexing(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(sum(LENGTHS), 2, 3, generator=generator, dtype=torch.float64)
    everywhere = torch.from_numpy(held_by_all(size))
    rows = [everywhere[plan_of(rank, size).gather] for rank in range(size)]
    factors = [
        torch.randn(len(row), 2, 3, generator=generator, dtype=torch.float64) for row in rows
    ]

    def work(rank: int, group: Any) -> tuple[Tensor, Tensor]:
        plan = context_plan(LENGTHS, group, CPU)
        local = whole[torch.from_numpy(local_tokens(LENGTHS, rank, size))].requires_grad_()
        keys = plan.gather_keys(local)
        (gradient,) = torch.autograd.grad((keys * factors[rank]).sum(), local)
        return keys.detach(), gradient

    found = on_ranks(size, work)
    naive = whole.clone().requires_grad_()
    total = sum((naive[row] * factor).sum() for row, factor in zip(rows, factors, strict=True))
    assert isinstance(total, Tensor)
    (expected,) = torch.autograd.grad(total, naive)
    for rank, (keys, gradient) in enumerate(found):
        assert torch.equal(keys, whole[rows[rank]])
        mine = torch.from_numpy(local_tokens(LENGTHS, rank, size))
        torch.testing.assert_close(gradient, expected[mine], rtol=0.0, atol=1e-12)


def test_a_sum_over_ranks_has_the_gradient_of_all_their_losses() -> None:
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -5.0])]
    slopes = [torch.tensor([0.5, 1.0]), torch.tensor([7.0, -2.0])]

    def work(rank: int, group: Any) -> tuple[Tensor, Tensor]:
        part = parts[rank].clone().requires_grad_()
        total = sum_over_ranks(part, group)
        (gradient,) = torch.autograd.grad((total * slopes[rank]).sum(), part)
        return total.detach(), gradient

    for total, gradient in on_ranks(2, work):
        assert total.tolist() == [4.0, -3.0]
        assert gradient.tolist() == [7.5, -1.0]
