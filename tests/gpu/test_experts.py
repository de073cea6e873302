"""A rank's experts in bf16 on a card against a loop in fp64."""

import pytest
import torch
import torch.nn.functional as F
from support.groups import groups
from torch import Tensor

from slime.backends.megatron.process.stock import load_megatron, without_warnings

load_megatron()

pytestmark = pytest.mark.gpu1

HIDDEN, WIDTH = 512, 256
COUNTS = {
    "uneven": [300, 1, 77, 512, 3, 129, 0, 1000],
    "most without a token": [0, 0, 2000, 0, 0, 0, 0, 0],
    "no tokens": [0] * 8,
}


def loop(x: Tensor, counts: list[int], probs: Tensor, first: Tensor, second: Tensor) -> Tensor:
    outputs: list[Tensor] = []
    for rows, weights, one, two in zip(
        x.split(counts), probs.split(counts), first, second, strict=True
    ):
        gate, up = (rows @ one.T).chunk(2, -1)
        outputs.append((F.silu(gate) * up * weights[:, None]) @ two.T)
    return torch.cat(outputs)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@without_warnings()
def test_outputs_and_gradients_equal_a_loop_in_fp64(counts: list[int]) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from slime.backends.megatron.layers.experts import GroupedExperts

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        num_moe_experts=len(counts),
        moe_ffn_hidden_size=WIDTH,
        perform_initialization=False,
        params_dtype=torch.bfloat16,
    )
    experts = GroupedExperts(len(counts), config, pg_collection=groups())
    torch.manual_seed(0)
    for weight in experts.parameters():
        weight.data.normal_(0.0, weight.shape[-1] ** -0.5)
    x = torch.randn(sum(counts), HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    probs = torch.rand(sum(counts), device="cuda").requires_grad_()
    output, bias = experts(x, torch.tensor(counts, device="cuda"), probs)
    assert bias is None
    inputs = [x, probs, experts.weight1, experts.weight2]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = loop(wide[0], counts, *wide[1:])
    grad = torch.randn_like(output)
    ours = torch.autograd.grad(output, inputs, grad)
    theirs = torch.autograd.grad(expected, wide, grad.double())
    for name, found, reference in zip(
        ["output", "x", "probs", "weight1", "weight2"],
        [output, *ours],
        [expected, *theirs],
        strict=True,
    ):
        assert found.shape == reference.shape, name
        # Two products in bf16, each rounded once: 2^-8 of each number.
        error = (found.detach().double() - reference.detach()).norm()
        assert float(error) <= 1e-2 * float(reference.detach().norm()), name
