"""Norms computed by one call must give the bits of transformers' six, or be left alone."""

import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from slime.engines.embedded.norms import speed_up_norms


def test_bits_stay_in_every_shape() -> None:
    norm = Qwen3RMSNorm(96)
    nn.init.normal_(norm.weight)
    inputs = [torch.randn(shape) for shape in ((1, 96), (8, 1, 96), (128, 1, 96), (2, 17, 96))]
    before = [norm(x) for x in inputs]
    weight = norm.weight.detach().clone()
    with torch.inference_mode():
        assert speed_up_norms(nn.Sequential(norm)) == 1
    assert torch.equal(norm.weight, weight)
    assert all(torch.equal(norm(x), y) for x, y in zip(inputs, before, strict=True))


def test_new_weights_are_seen() -> None:
    norm = Qwen3RMSNorm(32).requires_grad_(False)
    speed_up_norms(norm)
    norm.weight.copy_(torch.full((32,), 2.0))
    x = torch.randn(4, 32)
    fresh = Qwen3RMSNorm(32).requires_grad_(False)
    assert torch.equal(norm(x), 2 * fresh(x))


def test_a_norm_of_another_kind_is_left_alone() -> None:
    norm = GemmaRMSNorm(32).requires_grad_(False)  # times 1 + weight
    nn.init.normal_(norm.weight)
    x = torch.randn(4, 32)
    before = norm(x)
    assert speed_up_norms(norm) == 0
    assert torch.equal(norm(x), before)
