"""On a card one kernel gives the checksums that torch's own operations give on a CPU."""

import pytest
import torch
from torch import Tensor

from slime.engines.checksum import ROW, checksums, start_strip_checksums

pytestmark = pytest.mark.gpu1


def tensors() -> list[Tensor]:
    """Whole rows and parts of one, any dtype, odd sizes, odd places, strides."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31 - 1, (5 * ROW,), generator=generator, dtype=torch.int32)
    data = words.view(torch.uint8)
    sizes = [0, 1, 3, 4095, 4096, 4097, ROW - 1, ROW, ROW + 1, 3 * ROW + 77, 5 * ROW]
    odd = [data[1:9], data[:7], data[2:70001]]
    strided = [words.view(-1, 64)[:, :7], words[: 64 * 33].view(33, 64).t()]
    return [*(words[:size] for size in sizes), *odd, *strided, words[:99].view(torch.bfloat16)]


def test_a_card_finds_what_a_cpu_finds() -> None:
    on_cpu = tensors()
    assert checksums([tensor.cuda() for tensor in on_cpu]) == checksums(on_cpu)


def test_rows_of_a_strip_may_have_gaps_between_them() -> None:
    data = torch.randint(256, (40, 1024), dtype=torch.uint8)
    for width in (1000, 1001, 1024):
        expected = start_strip_checksums([data[:, :width]]).numbers()
        assert start_strip_checksums([data.cuda()[:, :width]]).numbers() == expected


def test_one_bit_shows() -> None:
    tensor = torch.zeros(3 * ROW + 5, dtype=torch.int32, device="cuda")
    (before,) = checksums([tensor])
    for place in (0, ROW - 1, ROW, 3 * ROW + 4):
        tensor[place] = 1
        assert checksums([tensor]) != [before], place
        tensor[place] = 0
    assert checksums([tensor]) == [before]
