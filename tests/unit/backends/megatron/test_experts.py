"""Grouped experts against a loop over experts written from the formula."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.groups import groups
from torch import Tensor

from slime.backends.megatron.process.stock import load_megatron, without_warnings
from slime.errors import ConfigError

load_megatron()

HIDDEN, WIDTH = 16, 8


@without_warnings()
def config(num_experts: int, **changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "num_moe_experts": num_experts,
        "moe_ffn_hidden_size": WIDTH,
        "perform_initialization": False,
    }
    return TransformerConfig(**values | changes)


def experts(num_experts: int, **changes: Any) -> Any:
    from slime.backends.megatron.layers.experts import GroupedExperts

    made = GroupedExperts(num_experts, config(num_experts, **changes), pg_collection=groups())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return made


def loop(x: Tensor, counts: list[int], probs: Tensor, first: Tensor, second: Tensor) -> Tensor:
    outputs: list[Tensor] = []
    pieces = zip(x.split(counts), probs.split(counts), first, second, strict=True)
    for rows, weights, gate_up, down in pieces:
        gate, up = (rows @ gate_up.T).chunk(2, -1)
        outputs.append(weights[:, None] * (gate / (1 + torch.exp(-gate)) * up @ down.T))
    return torch.cat(outputs)


@pytest.mark.parametrize("counts", [[3, 1, 5], [4, 0, 2], [0, 0, 7], [0, 6, 0], [0, 0, 0]])
def test_outputs_and_gradients_equal_those_of_a_loop(counts: list[int]) -> None:
    made = experts(len(counts))
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, probs, grad = random(sum(counts), HIDDEN), random(sum(counts)), random(sum(counts), HIDDEN)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, probs)]
    output, bias = made(inputs[0], torch.tensor(counts), inputs[1])
    output.backward(grad)
    reference = [
        tensor.detach().clone().requires_grad_()
        for tensor in (x, probs, made.weight1, made.weight2)
    ]
    expected = loop(reference[0], counts, *reference[1:])
    expected.backward(grad)
    assert bias is None
    torch.testing.assert_close(output, expected)
    for ours, theirs in zip([*inputs, made.weight1, made.weight2], reference, strict=True):
        # Also of experts without a token: an edge left out would leave None.
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_probabilities_keep_their_precision_in_bf16() -> None:
    made = experts(1, params_dtype=torch.bfloat16)
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    probs = torch.full((4,), 1.0038, requires_grad=True)
    assert probs.bfloat16().eq(1).all()
    output, _ = made(x, torch.tensor([4]), probs)
    one, _ = made(x, torch.tensor([4]), torch.ones(4))
    assert output.dtype == torch.bfloat16
    assert not torch.equal(output, one)
    output.backward(torch.ones_like(output))
    assert probs.grad is not None
    assert probs.grad.dtype == torch.float32


def test_rows_that_no_grouped_product_takes_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows of 6 numbers, 24 bytes"):
        experts(2, moe_ffn_hidden_size=6)


@without_warnings()
def test_bias_of_the_router_stays_fp32_in_a_bf16_model() -> None:
    from slime.backends.megatron.layers.experts import Router

    changes = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    router = torch.nn.Sequential(Router(config(4, **changes), pg_collection=groups()))
    router.bfloat16()
    assert router[0].weight.dtype == torch.bfloat16
    assert router[0].expert_bias.dtype == torch.float32
