"""A checksum changes with every bit and every order, and with nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.engines.checksum import checksum


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(data: bytes) -> int:
    """The same sum, word by word in Python, from the multipliers' definition."""
    mask = (1 << 64) - 1

    def odd(i: int) -> int:
        z = i * 0x9E3779B97F4A7C15 & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return (z ^ (z >> 31)) | 1

    total = len(data) * 0x9E3779B97F4A7C15
    words = len(data) // 4
    for i in range(words):
        word = int.from_bytes(data[4 * i : 4 * i + 4], "little", signed=True)
        total += word * odd(1 + i % 65536) * odd((1 << 32) + i // 65536)
    rest = int.from_bytes(data[4 * words :], "little")
    total += rest * 0xD6E8FEB86659FD93 * odd((1 << 32) + words // 65536)
    total &= mask
    return total - (1 << 64) if total >> 63 else total


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 65535, 65536, 65537, 70001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_agrees_with_the_definition(count: int, dtype: torch.dtype) -> None:
    tensor = (numbers(count) * 50).abs().to(dtype)
    data = bytes(tensor.view(torch.uint8).tolist())
    assert checksum(tensor) == naive(data)


def test_known_value() -> None:
    assert checksum(torch.arange(5, dtype=torch.int32)) == naive(
        b"".join(i.to_bytes(4, "little") for i in range(5))
    )


@given(st.integers(0, 299), st.integers(0, 299))
@settings(max_examples=50, deadline=None)
def test_a_swap_of_two_elements_shows(i: int, j: int) -> None:
    tensor = numbers(300)
    swapped = tensor.clone()
    swapped[i], swapped[j] = tensor[j], tensor[i]
    assert (checksum(swapped) == checksum(tensor)) == (i == j)


@given(st.integers(0, 299), st.integers(0, 31))
@settings(max_examples=50, deadline=None)
def test_a_flipped_bit_shows(i: int, bit: int) -> None:
    tensor = numbers(300)
    flipped = tensor.clone()
    flipped.view(torch.int32)[i] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert checksum(flipped) != checksum(tensor)


def test_exchanged_signs_show() -> None:
    # The case that sums with 64-bit words and odd multipliers miss.
    plus_minus = torch.tensor([1.0, 1.0, 1.0, -1.0])
    minus_plus = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert checksum(plus_minus) != checksum(minus_plus)


def test_a_transposition_shows() -> None:
    matrix = numbers(40, 50)
    assert checksum(matrix.T) != checksum(matrix)
    assert checksum(matrix.T) == checksum(matrix.T.contiguous())


def test_swaps_across_the_rows_of_one_pass_show() -> None:
    tensor = numbers(200_000)
    swapped = tensor.clone()
    swapped[5], swapped[65536 + 5] = tensor[65536 + 5], tensor[5]
    assert checksum(swapped) != checksum(tensor)


def test_number_of_zeros_shows() -> None:
    assert checksum(torch.zeros(3)) != checksum(torch.zeros(4))


def test_shape_strides_and_offset_do_not_matter() -> None:
    tensor = numbers(7, 9, dtype=torch.bfloat16)
    assert checksum(tensor.reshape(63)) == checksum(tensor)
    # An odd element offset in bf16 is no multiple of four bytes.
    assert checksum(tensor.reshape(63)[1:]) == checksum(tensor.reshape(63)[1:].clone())
    assert checksum(torch.tensor(1.5)) == checksum(torch.tensor([1.5]))


def test_same_values_in_another_dtype_are_other_bytes() -> None:
    tensor = numbers(64, dtype=torch.bfloat16)
    assert checksum(tensor.float()) != checksum(tensor)
    assert checksum(tensor.float().to(torch.bfloat16)) == checksum(tensor)
