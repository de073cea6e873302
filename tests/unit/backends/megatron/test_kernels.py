from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slime.backends.megatron.layers.attention import _padded_attention
from slime.backends.megatron.layers.kernels import put_back, rms_norm, rotate, swiglu, take
from slime.backends.megatron.packs.pack import padded_layout


def both(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Output and gradients, the output weighted so that no gradient is uniform."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weight = torch.linspace(-1.0, 2.0, out.numel()).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def assert_same(ours: list[Tensor], reference: list[Tensor]) -> None:
    # fp32 sums in another order.
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 1, 24), (40, 1, 3, 8)])
def test_rms_norm_equals_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    reference = both(lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), x, weight)
    assert_same(both(lambda x, w: rms_norm(x, w, 1e-6), x, weight), reference)


def test_swiglu_equals_silu_of_the_first_half_times_the_second() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 1, 16) * 3
    assert_same(both(swiglu, x), both(lambda x: F.silu(x[..., :8]) * x[..., 8:], x))


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("num_pairs", [4, 2])
def test_rotate_equals_a_complex_product(is_interleaved: bool, num_pairs: int) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(10, 1, 3, 8), torch.randn(10, 1, 1, num_pairs)

    def reference(x: Tensor) -> Tensor:
        turned = x[..., : 2 * num_pairs]
        pairs = turned.unflatten(-1, (-1, 2) if is_interleaved else (2, -1))
        pairs = pairs if is_interleaved else pairs.transpose(-1, -2)
        product = torch.view_as_complex(pairs.contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        back = torch.view_as_real(product)
        back = back if is_interleaved else back.transpose(-1, -2)
        return torch.cat([back.flatten(-2), x[..., 2 * num_pairs :]], -1)

    def ours(x: Tensor) -> Tensor:
        return rotate(x, angles.cos(), angles.sin(), is_interleaved=is_interleaved)

    assert_same(both(ours, x), both(reference, x))


def test_take_and_put_back_undo_each_other_with_their_gradients() -> None:
    layout = padded_layout([3, 5, 1])
    x = torch.randn(9, 2)

    def round_trip(x: Tensor) -> Tensor:
        return put_back(take(x, layout.gather, layout.scatter), layout.scatter)

    assert_same(both(round_trip, x), both(lambda x: x * 1.0, x))


@pytest.mark.parametrize("lengths", [[6, 6], [9, 2, 8, 1, 3]])
def test_padded_attention_equals_a_loop_over_sequences(lengths: list[int]) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = torch.randn(total, 4, 8), torch.randn(total, 2, 8), torch.randn(total, 2, 8)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs: list[Tensor] = []
        for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            one, two, three = (part.transpose(0, 1)[None] for part in parts)
            out = F.scaled_dot_product_attention(
                one, two, three, is_causal=True, scale=0.3, enable_gqa=True
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    layout = padded_layout(lengths)
    ours = both(lambda *x: _padded_attention(*x, layout, 0.3), q, k, v)
    assert_same(ours, both(loop, q, k, v))
