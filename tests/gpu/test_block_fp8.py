"""Weights in 8 bits made on the card have the bits that the converter writes on a CPU."""

import pytest
import torch

from slime.checkpoint.block_fp8 import quantized

pytestmark = pytest.mark.gpu1


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(512, 1024), (130, 300)])
def test_the_card_quantizes_as_the_host_does(shape: tuple[int, int], power_of_two: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    small, scales = quantized(weight, power_of_two=power_of_two)
    on_card, scales_on_card = quantized(weight.cuda(), power_of_two=power_of_two)
    assert torch.equal(scales_on_card.cpu(), scales)
    assert torch.equal(on_card.cpu().view(torch.uint8), small.view(torch.uint8))
