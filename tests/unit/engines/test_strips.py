"""Neighbours in memory become one view, others never do."""

import numpy as np
import torch
from torch import Tensor

from slime.engines.checksum import ROW, checksum, checksums, sums_of
from slime.engines.strips import copy_all, strips_of


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def rows(strips: list[Tensor]) -> list[bytes]:
    return [bytes(row.tolist()) for strip in strips for row in strip]


def test_experts_of_a_layer_are_one_strip_without_a_copy() -> None:
    stack = torch.randn(6, 8, 5, dtype=torch.bfloat16)
    parameter = torch.nn.Parameter(stack)
    gates_and_ups = parameter.view(12, 4, 5).unbind()
    (strip,) = strips_of(gates_and_ups)
    assert strip.shape == (12, 40)
    assert strip.data_ptr() == stack.data_ptr()
    assert not strip.requires_grad
    assert rows([strip]) == [bytes_of(tensor) for tensor in gates_and_ups]


def test_any_tensors_have_their_bytes_in_their_order() -> None:
    base = torch.arange(64, dtype=torch.int32)
    tensors = [
        *(base[8 * i : 8 * i + 8] for i in (2, 3, 4, 0, 6, 5)),
        base.view(8, 8).t(),
        base.view(8, 8)[:, 0],
        base[::2],
        *torch.zeros(3, 0),
        torch.tensor(3.0),
        base[1:3],
        base[3:5],
    ]
    strips = strips_of(tensors)
    assert rows(strips) == [bytes_of(tensor) for tensor in tensors]
    assert [len(strip) for strip in strips[:4]] == [3, 1, 1, 1]
    assert len(strips[-1]) == 2


def test_neighbours_of_two_allocations_stay_apart() -> None:
    memory = np.arange(16, dtype=np.float32)
    left, right = torch.from_numpy(memory[:8]), torch.from_numpy(memory[8:])
    assert left.data_ptr() + left.nbytes == right.data_ptr()
    assert [tuple(strip.shape) for strip in strips_of([left, right])] == [(1, 32), (1, 32)]


def test_no_tensors_are_no_strips() -> None:
    assert strips_of([]) == []


def test_small_and_big_ones_are_copied() -> None:
    sources = [torch.randn(size) for size in (3, 2**18, 5, 2**18 + 1)]
    targets = [torch.zeros_like(source) for source in sources]
    copy_all(targets, sources)
    assert all(map(torch.equal, targets, sources))


def test_a_strip_has_the_checksum_of_each_of_its_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    for count, size in ((5, 8), (3, 7), (300, 4 * 1000), (2, 4 * ROW + 12), (3, 2), (4, 0)):
        data = torch.randint(256, (count, size + 9), generator=generator, dtype=torch.uint8)
        for strip in (data[:, :size].contiguous(), data[:, :size], data[:, 1 : size + 1]):
            assert sums_of(strip).tolist() == [checksum(row.clone()) for row in strip]


def test_a_bit_of_one_expert_shows_in_its_checksum_alone() -> None:
    stack = torch.randn(7, 3, 4)
    before = checksums(stack.unbind())
    stack.view(torch.int32)[4, 1, 1] ^= 1 << 20
    changed = [old != new for old, new in zip(before, checksums(stack.unbind()), strict=True)]
    assert changed == [i == 4 for i in range(7)]
