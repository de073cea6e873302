"""Attention of packs by the kernels of a card, in bf16, against fp64 sequence by sequence."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.backends.megatron.process.stock import load_megatron

load_megatron()

pytestmark = pytest.mark.gpu1

# (query heads, key heads, width of queries, width of values)
SHAPES = {
    "qwen3": (32, 8, 128, 128),
    "one key head": (8, 1, 128, 128),
    "all heads": (4, 4, 64, 64),
    "small heads": (4, 2, 16, 16),
    "latent": (16, 16, 192, 128),
}
LENGTHS = [(1, 1), (513, 513), (2, 2), (1300, 1300), (127, 127)]
# Of context parallelism: queries are the last positions of their keys.
SPANS = [(200, 200), (200, 1600), (16, 16), (16, 128)]


def kernels() -> list[str]:
    from slime.backends.megatron.layers.attention import flash_attention_4

    return ["varlen_attn"] if flash_attention_4() is None else ["varlen_attn", "flash-attn-4"]


def naive(q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[int, int]], scale: float) -> Tensor:
    """[T, heads, D_v] in fp64, masked bottom right."""
    groups = q.shape[1] // k.shape[1]
    outs: list[Tensor] = []
    lengths = [list(x) for x in zip(*spans, strict=True)]
    for one, two, three in zip(
        q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True
    ):
        keys, values = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (two, three))
        scores = one.transpose(0, 1) @ keys.transpose(1, 2) * scale
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        seen = seen.tril(len(two) - len(one))
        outs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outs)


def packed(spans: list[tuple[int, int]]) -> Any:
    from slime.backends.megatron.packs.pack import Packed

    queries, keys = (
        torch.tensor([0, *x], device="cuda").cumsum(0).to(torch.int32)
        for x in zip(*spans, strict=True)
    )
    longest = [max(int(b - a) for a, b in pairwise(ends.tolist())) for ends in (queries, keys)]
    return Packed(
        qkv_format="packed",
        cu_seqlens_q=queries,
        cu_seqlens_kv=keys,
        max_seqlen_q=longest[0],
        max_seqlen_kv=longest[1],
    )


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("kernel", ["varlen_attn", "flash-attn-4"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spans", [LENGTHS, SPANS], ids=["sequences", "spans"])
def test_outputs_and_gradients_equal_fp64(
    shape: str, spans: list[tuple[int, int]], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slime.backends.megatron.layers import attention

    if kernel not in kernels():
        pytest.skip("flash-attn-4 is not installed")
    if kernel == "varlen_attn":
        monkeypatch.setattr(attention, "flash_attention_4", lambda: None)
    heads, groups, width, values = SHAPES[shape]
    torch.manual_seed(0)
    num_queries, num_keys = (sum(x) for x in zip(*spans, strict=True))
    sizes = [(num_queries, heads, width), (num_keys, groups, width), (num_keys, groups, values)]
    inputs = [
        torch.randn(size, device="cuda", dtype=torch.bfloat16).requires_grad_() for size in sizes
    ]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    config: Any = SimpleNamespace(kv_channels=width)
    layer = attention.VarlenAttention.__new__(attention.VarlenAttention)
    torch.nn.Module.__init__(layer)
    layer.config, layer.scale = config, width**-0.5
    out = layer(
        *(x.unsqueeze(1) for x in inputs),
        None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=packed(spans),
    )
    expected = naive(*wide, spans, width**-0.5).flatten(1)[:, None]
    assert out.dtype == torch.bfloat16
    # bf16 keeps 8 bits: 2^-8 = 0.4 % of each number.
    assert relative(out, expected) < 6e-3
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, grad)
    theirs = torch.autograd.grad(expected, wide, grad.double())
    for name, one, two in zip("qkv", ours, theirs, strict=True):
        assert relative(one, two) < 1e-2, name
