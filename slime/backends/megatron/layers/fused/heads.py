"""From the joined projection to query, key and value: cut, normed and rotated in one pass."""

# Triton's launches have no types.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slime.backends.megatron.layers.fused.norm import num_programs

# Heads of one program, with the head's dimensions a tile of registers.
_HEADS = 32


@dataclass(frozen=True)
class HeadLayout:
    """Heads of this rank.

    Attributes:
        groups: key/value heads; each stands behind its queries in the joined projection.
        queries: query heads per group.
        size: of a head, D.
        eps: of the norms.
        is_interleaved: a rotary pair is two neighbours, else dimensions i and i + D_rot / 2.
    """

    groups: int
    queries: int
    size: int
    eps: float
    is_interleaved: bool

    @property
    def stride(self) -> int:
        """Width of the joined projection."""
        return self.groups * (self.queries + 2) * self.size


def split_heads(
    mixed: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    layout: HeadLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    """(query [T, groups x queries, D], key, value [T, groups, D]).

    Args:
        mixed: [T, layout.stride], contiguous.
        cos, sin: [T, D_rot / 2] fp32, one angle per pair; later dimensions pass unturned.
        norms: [D] weights of the RMS norms of query and key; None = there are none.
    """
    first, second = norms or (None, None)
    return _SplitHeads.apply(mixed, cos, sin, first, second, layout)  # pyright: ignore[reportReturnType]


def _sizes(layout: HeadLayout, half: int) -> tuple[int, dict[str, Any]]:
    """(blocks of heads, the kernels' constants)."""
    per_group = layout.queries + 2
    groups = max(min(_HEADS // per_group, layout.groups), 1)
    rest = layout.size - 2 * half
    constants: dict[str, Any] = {
        "GROUPS": layout.groups,
        "QUERIES": layout.queries,
        "SIZE": layout.size,
        "HALF": half,
        "BLOCK_GROUPS": groups,
        "BLOCK_HEADS": triton.next_power_of_2(groups * per_group),
        "BLOCK_HALF": triton.next_power_of_2(half),
        "BLOCK_REST": triton.next_power_of_2(rest) if rest else 0,
        "IS_INTERLEAVED": layout.is_interleaved,
    }
    return triton.cdiv(layout.groups, groups), constants


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        cos: Tensor,
        sin: Tensor,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        layout: HeadLayout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, size = mixed.shape[0], layout.size
        query = mixed.new_empty(count, layout.groups * layout.queries, size)
        key, value = (mixed.new_empty(count, layout.groups, size) for _ in range(2))
        blocks, constants = _sizes(layout, cos.shape[-1])
        has_norm = query_norm is not None
        if count:
            _forward[(count, blocks)](
                mixed, cos, sin, query_norm, key_norm, query, key, value, layout.eps,
                HAS_NORM=has_norm, **constants,
            )  # fmt: skip
        ctx.layout = layout
        ctx.width = mixed.shape[1]
        ctx.save_for_backward(mixed if has_norm else None, cos, sin, query_norm, key_norm)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        mixed, cos, sin, query_norm, key_norm = ctx.saved_tensors
        layout: HeadLayout = ctx.layout
        query, key, value = (grad.contiguous() for grad in grad_outputs)
        count = query.shape[0]
        grad_mixed = query.new_empty(count, ctx.width)
        blocks, constants = _sizes(layout, cos.shape[-1])
        has_norm = query_norm is not None
        programs = num_programs(query.device, count) if has_norm else max(count, 1)
        sums = None
        if has_norm:
            sums = torch.empty(
                programs, blocks, 2, layout.size, dtype=torch.float32, device=query.device
            )
        _backward[(programs, blocks)](
            query, key, value, mixed, cos, sin, query_norm, key_norm, grad_mixed, sums, count,
            layout.eps, HAS_NORM=has_norm, **constants,
        )  # fmt: skip
        if sums is None:
            return grad_mixed, None, None, None, None, None
        grad_query_norm, grad_key_norm = sums.sum((0, 1)).to(query_norm.dtype).unbind(0)
        return grad_mixed, None, None, grad_query_norm, grad_key_norm, None


@triton.jit
def _columns(HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """(dimension of the first of each pair, of the second)."""
    pair = tl.arange(0, BLOCK_HALF)
    if IS_INTERLEAVED:
        return 2 * pair, 2 * pair + 1
    return pair, pair + HALF


@triton.jit
def _norm_weight(query_norm, key_norm, columns, mask, is_query, is_key):
    """[heads, columns] weight of each head's norm; 1 for values."""
    one = tl.load(query_norm + columns, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(key_norm + columns, mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], one[None, :], tl.where(is_key[:, None], two[None, :], 1.0))


@triton.jit
def _forward(
    mixed, cos, sin, query_norm, key_norm, query, key, value, eps,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, IS_INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK_HEADS)
    group = tl.program_id(1) * BLOCK_GROUPS + number // (QUERIES + 2)
    part = number % (QUERIES + 2)
    is_head = (number < BLOCK_GROUPS * (QUERIES + 2)) & (group < GROUPS)
    is_query, is_key, is_value = part < QUERIES, part == QUERIES, part > QUERIES
    first, second = _columns(HALF, BLOCK_HALF, IS_INTERLEAVED)
    pair = tl.arange(0, BLOCK_HALF)
    is_pair = pair < HALF
    mask = is_head[:, None] & is_pair[None, :]
    source = mixed + (token * GROUPS * (QUERIES + 2) + group * (QUERIES + 2) + part)[:, None] * SIZE
    one = tl.load(source + first[None, :], mask=mask, other=0.0).to(tl.float32)
    two = tl.load(source + second[None, :], mask=mask, other=0.0).to(tl.float32)
    if BLOCK_REST > 0:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        is_rest = rest < SIZE
        rest_mask = is_head[:, None] & is_rest[None, :]
        three = tl.load(source + rest[None, :], mask=rest_mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(one * one, 1) + tl.sum(two * two, 1)
        if BLOCK_REST > 0:
            squares += tl.sum(three * three, 1)
        scale = tl.where(is_value, 1.0, tl.rsqrt(squares / SIZE + eps))[:, None]
        one *= scale * _norm_weight(query_norm, key_norm, first, is_pair, is_query, is_key)
        two *= scale * _norm_weight(query_norm, key_norm, second, is_pair, is_query, is_key)
        if BLOCK_REST > 0:
            three *= scale * _norm_weight(query_norm, key_norm, rest, is_rest, is_query, is_key)
    c = tl.load(cos + token * HALF + pair, mask=is_pair, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + pair, mask=is_pair, other=0.0)[None, :]
    c = tl.where(is_value[:, None], 1.0, c)
    s = tl.where(is_value[:, None], 0.0, s)
    dtype = query.dtype.element_ty
    turned_one = (one * c - two * s).to(dtype)
    turned_two = (two * c + one * s).to(dtype)
    to_query = query + (token * GROUPS * QUERIES + group * QUERIES + part)[:, None] * SIZE
    to_key = key + (token * GROUPS + group)[:, None] * SIZE
    to_value = value + (token * GROUPS + group)[:, None] * SIZE
    tl.store(to_query + first[None, :], turned_one, mask=mask & is_query[:, None])
    tl.store(to_query + second[None, :], turned_two, mask=mask & is_query[:, None])
    tl.store(to_key + first[None, :], turned_one, mask=mask & is_key[:, None])
    tl.store(to_key + second[None, :], turned_two, mask=mask & is_key[:, None])
    tl.store(to_value + first[None, :], turned_one, mask=mask & is_value[:, None])
    tl.store(to_value + second[None, :], turned_two, mask=mask & is_value[:, None])
    if BLOCK_REST > 0:
        out = three.to(dtype)
        tl.store(to_query + rest[None, :], out, mask=rest_mask & is_query[:, None])
        tl.store(to_key + rest[None, :], out, mask=rest_mask & is_key[:, None])
        tl.store(to_value + rest[None, :], out, mask=rest_mask & is_value[:, None])


@triton.jit
def _load_heads(query, key, value, columns, mask, is_query, is_key, is_value):
    """[heads, columns] fp32 from three tensors, each head from its own."""
    one = tl.load(query + columns, mask=mask & is_query[:, None], other=0.0).to(tl.float32)
    two = tl.load(key + columns, mask=mask & is_key[:, None], other=0.0).to(tl.float32)
    three = tl.load(value + columns, mask=mask & is_value[:, None], other=0.0).to(tl.float32)
    return one + two + three


@triton.jit
def _backward(
    query, key, value, mixed, cos, sin, query_norm, key_norm, grad_mixed, sums, count, eps,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, IS_INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    number = tl.arange(0, BLOCK_HEADS)
    group = tl.program_id(1) * BLOCK_GROUPS + number // (QUERIES + 2)
    part = number % (QUERIES + 2)
    is_head = (number < BLOCK_GROUPS * (QUERIES + 2)) & (group < GROUPS)
    is_query, is_key, is_value = part < QUERIES, part == QUERIES, part > QUERIES
    first, second = _columns(HALF, BLOCK_HALF, IS_INTERLEAVED)
    pair = tl.arange(0, BLOCK_HALF)
    is_pair = pair < HALF
    mask = is_head[:, None] & is_pair[None, :]
    dtype = grad_mixed.dtype.element_ty
    if BLOCK_REST > 0:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        is_rest = rest < SIZE
        rest_mask = is_head[:, None] & is_rest[None, :]
    if HAS_NORM:
        weight_one = _norm_weight(query_norm, key_norm, first, is_pair, is_query, is_key)
        weight_two = _norm_weight(query_norm, key_norm, second, is_pair, is_query, is_key)
        sum_one = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
        sum_two = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
        if BLOCK_REST > 0:
            weight_three = _norm_weight(query_norm, key_norm, rest, is_rest, is_query, is_key)
            sum_three = tl.zeros([BLOCK_HEADS, BLOCK_REST], tl.float32)
    for token in range(tl.program_id(0).to(tl.int64), count, tl.num_programs(0)):
        at_query = query + (token * GROUPS * QUERIES + group * QUERIES + part)[:, None] * SIZE
        at_key = key + (token * GROUPS + group)[:, None] * SIZE
        at_value = value + (token * GROUPS + group)[:, None] * SIZE
        row = (token * GROUPS * (QUERIES + 2) + group * (QUERIES + 2) + part)[:, None] * SIZE
        turned_one = _load_heads(
            at_query, at_key, at_value, first[None, :], mask, is_query, is_key, is_value
        )
        turned_two = _load_heads(
            at_query, at_key, at_value, second[None, :], mask, is_query, is_key, is_value
        )
        c = tl.load(cos + token * HALF + pair, mask=is_pair, other=0.0)[None, :]
        s = tl.load(sin + token * HALF + pair, mask=is_pair, other=0.0)[None, :]
        c = tl.where(is_value[:, None], 1.0, c)
        s = tl.where(is_value[:, None], 0.0, s)
        grad_one = turned_one * c + turned_two * s
        grad_two = turned_two * c - turned_one * s
        if BLOCK_REST > 0:
            grad_three = _load_heads(
                at_query, at_key, at_value, rest[None, :], rest_mask, is_query, is_key, is_value
            )
        if HAS_NORM:
            one = tl.load(mixed + row + first[None, :], mask=mask, other=0.0).to(tl.float32)
            two = tl.load(mixed + row + second[None, :], mask=mask, other=0.0).to(tl.float32)
            squares = tl.sum(one * one, 1) + tl.sum(two * two, 1)
            if BLOCK_REST > 0:
                three = tl.load(mixed + row + rest[None, :], mask=rest_mask, other=0.0)
                three = three.to(tl.float32)
                squares += tl.sum(three * three, 1)
            scale = tl.where(is_value, 1.0, tl.rsqrt(squares / SIZE + eps))[:, None]
            one *= scale
            two *= scale
            sum_one += grad_one * one
            sum_two += grad_two * two
            grad_one *= weight_one
            grad_two *= weight_two
            mean = tl.sum(grad_one * one, 1) + tl.sum(grad_two * two, 1)
            if BLOCK_REST > 0:
                three *= scale
                sum_three += grad_three * three
                grad_three *= weight_three
                mean += tl.sum(grad_three * three, 1)
            mean = tl.where(is_value, 0.0, mean / SIZE)[:, None]
            grad_one = (grad_one - one * mean) * scale
            grad_two = (grad_two - two * mean) * scale
            if BLOCK_REST > 0:
                grad_three = (grad_three - three * mean) * scale
        tl.store(grad_mixed + row + first[None, :], grad_one.to(dtype), mask=mask)
        tl.store(grad_mixed + row + second[None, :], grad_two.to(dtype), mask=mask)
        if BLOCK_REST > 0:
            tl.store(grad_mixed + row + rest[None, :], grad_three.to(dtype), mask=rest_mask)
    if HAS_NORM:
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        sums += program * 2 * SIZE
        is_q, is_k = is_query[:, None] & is_head[:, None], is_key[:, None] & is_head[:, None]
        tl.store(sums + first, tl.sum(tl.where(is_q, sum_one, 0.0), 0), mask=is_pair)
        tl.store(sums + second, tl.sum(tl.where(is_q, sum_two, 0.0), 0), mask=is_pair)
        tl.store(sums + SIZE + first, tl.sum(tl.where(is_k, sum_one, 0.0), 0), mask=is_pair)
        tl.store(sums + SIZE + second, tl.sum(tl.where(is_k, sum_two, 0.0), 0), mask=is_pair)
        if BLOCK_REST > 0:
            tl.store(sums + rest, tl.sum(tl.where(is_q, sum_three, 0.0), 0), mask=is_rest)
            tl.store(sums + SIZE + rest, tl.sum(tl.where(is_k, sum_three, 0.0), 0), mask=is_rest)
