"""Parts of one block of the host's memory."""

import mmap

import pytest
import torch

from slime.backends.megatron.optimizer.host_memory import HostMemory, host_memory_for, padded_bytes


def test_parts_have_the_shape_asked_for_and_share_nothing() -> None:
    likes = [
        torch.zeros(3, 5),
        torch.zeros(7, dtype=torch.bfloat16),
        torch.zeros(0),
        torch.zeros(2, 2, dtype=torch.uint8),
    ]
    memory = host_memory_for(likes, copies=2)
    parts = [memory.take(like) for like in likes * 2]
    for number, (part, like) in enumerate(zip(parts, likes * 2, strict=True)):
        assert (part.shape, part.dtype) == (like.shape, like.dtype)
        part.fill_(number)
    for number, part in enumerate(parts):
        assert bool((part == number).all())
    with pytest.raises(AssertionError, match="more parts"):
        memory.take(torch.zeros(mmap.PAGESIZE))


def test_a_block_shares_no_page_with_anything() -> None:
    blocks = [HostMemory(1000) for _ in range(3)]
    starts = [memory.take(torch.zeros(1)).data_ptr() for memory in blocks]
    assert all(start % mmap.PAGESIZE == 0 for start in starts)
    assert len(set(starts)) == 3


def test_parts_start_at_whole_vectors() -> None:
    assert [padded_bytes(torch.zeros(n)) for n in (0, 1, 64, 65)] == [0, 256, 256, 512]


def test_memory_that_cannot_be_had_is_named() -> None:
    with pytest.raises(MemoryError, match=r"GiB of the host's memory could not be had: weights"):
        HostMemory(2**60)
