"""FusedDecoder: Llama, Qwen2 and Qwen3 in few calls of torch, on the model's own parameters.

transformers writes a decoder for reading; at a hundred rows per pass the calls cost more than their
numbers. Here query, key and value are one product, gate and up another, rotation is applied to
queries and keys together, and the mask and the scale ride along with the product of the scores.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slime.engines.embedded.cache import SlotCache

FUSED = "fused"

_MODEL_TYPES = frozenset({"llama", "qwen2", "qwen3"})
_FIRST_POSITIONS = 512


@dataclass(frozen=True, slots=True)
class _Layer:
    """Parameters of one layer; all of them share memory with the model's.

    Attributes:
        qkv: [(heads + 2 kv_heads) D, H]; o: [H, heads D], transposed.
        gate_up: [2 I, H]; down: [H, I], transposed.
        q_norm, k_norm: [D], or None.
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class FusedDecoder:
    """Computes what `model.get_decoder()` computes, up to the order of sums.

    Joined parameters replace the model's own, which become views of them: weights loaded into the
    model later are seen here, and its own code goes on working.

    Args:
        model: a transformers causal LM in fp32.

    Raises:
        NotImplementedError: another architecture, dtype, activation, a sliding window, or a
            rotation that depends on the length of the sequence.
    """

    def __init__(self, model: Any) -> None:
        config, decoder = model.config.get_text_config(), model.get_decoder()
        _check(model, config, decoder)
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = decoder.layers[0].self_attn.head_dim
        self._scale = self.head_dim**-0.5
        self._eps: float = config.rms_norm_eps
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._final_norm: Tensor = decoder.norm.weight
        self._rotary = decoder.rotary_emb
        self._layers = [_fuse(layer) for layer in decoder.layers]
        self._cos = self._sin = torch.empty(0)

    def prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        """Hidden states [B, Q, H] of whole prompts [B, Q]; keys and values go to the cache."""
        rows, length = ids.shape
        cos, sin = self._rotation(torch.arange(length).repeat(rows), length)
        x = F.embedding(ids.reshape(-1), self._embedding)
        for index, layer in enumerate(self._layers):
            queries, keys, values = (
                part.view(rows, length, -1, self.head_dim).transpose(1, 2)
                for part in self._heads_of(layer, x, cos, sin)
            )
            cache.update(keys, values, index)
            out = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=self._scale,
                enable_gqa=self.heads > self.kv_heads,
            )  # fmt: skip
            x = self._rest(layer, x, out.transpose(1, 2).reshape(rows * length, -1))
        return self._norm(x, self._final_norm).view(rows, length, -1)

    def decode(self, ids: Tensor, positions: Tensor, num_keys: int, cache: SlotCache) -> Tensor:
        """Hidden states [B, H] of one token per row.

        Args:
            ids, positions: [B].
            num_keys: how many cached tokens to read; more than every position.
        """
        rows, group = ids.shape[0], self.heads // self.kv_heads
        cos, sin = self._rotation(positions, num_keys)
        mask = torch.zeros(rows, 1, num_keys)
        mask.masked_fill_(torch.arange(num_keys) > positions[:, None, None], -torch.inf)
        if self.kv_heads > 1:
            mask = mask.repeat_interleave(self.kv_heads, 0)
        x = F.embedding(ids, self._embedding)
        for index, layer in enumerate(self._layers):
            queries, keys, values = self._heads_of(layer, x, cos, sin)
            keys, values = cache.update(keys[:, :, None], values[:, :, None], index)
            scores = torch.baddbmm(
                mask,
                queries.reshape(rows * self.kv_heads, group, self.head_dim),
                keys.flatten(0, 1).transpose(1, 2),
                alpha=self._scale,
            )
            out = torch.bmm(torch.softmax(scores, -1), values.flatten(0, 1))
            x = self._rest(layer, x, out.reshape(rows, -1))
        return self._norm(x, self._final_norm)

    def _heads_of(
        self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [N, heads, D], rotated keys and values [N, kv_heads, D] of x [N, H]."""
        qkv = F.linear(self._norm(x, layer.input_norm), layer.qkv, layer.qkv_bias)
        heads = qkv.view(len(qkv), -1, self.head_dim)
        turned = heads[:, : self.heads + self.kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            queries = self._norm(turned[:, : self.heads], layer.q_norm)
            keys = self._norm(turned[:, self.heads :], layer.k_norm)
            turned = torch.cat((queries, keys), 1)
        half = self.head_dim // 2
        out = turned * cos
        out[..., :half].addcmul_(turned[..., half:], sin[..., :half], value=-1.0)
        out[..., half:].addcmul_(turned[..., :half], sin[..., half:])
        values = heads[:, self.heads + self.kv_heads :]
        return out[:, : self.heads], out[:, self.heads :], values

    def _rest(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        """[N, H] after the layer, from its input and [N, heads D] of its attention."""
        x = torch.addmm(x, attended, layer.o)
        if layer.o_bias is not None:
            x += layer.o_bias
        gate, up = F.linear(self._norm(x, layer.post_norm), layer.gate_up).chunk(2, -1)
        return torch.addmm(x, F.silu(gate).mul_(up), layer.down)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        # A quarter faster than F.rms_norm, which is made of the same operations and casts between.
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True).add_(self._eps))).mul_(weight)

    def _rotation(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, 1, D] at positions [N], all below `length`."""
        if length > self._cos.shape[0]:
            known = max(_FIRST_POSITIONS, 2 * length)
            cos, sin = self._rotary(self._final_norm, torch.arange(known)[None])
            self._cos, self._sin = cos[0, :, None], sin[0, :, None]
        return self._cos[positions], self._sin[positions]


def _check(model: Any, config: Any, decoder: Any) -> None:
    wrong: list[str] = []
    if config.model_type not in _MODEL_TYPES:
        wrong.append(f"model type {config.model_type}")
    if model.dtype != torch.float32:
        wrong.append(f"dtype {model.dtype}")
    if getattr(config, "hidden_act", None) != "silu":
        wrong.append(f"activation {getattr(config, 'hidden_act', None)}")
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        wrong.append(f"layers {sorted(set(config.layer_types))}")
    rotary = getattr(decoder, "rotary_emb", None)
    kind = getattr(rotary, "rope_type", None)
    if kind is None or "dynamic" in kind or kind == "longrope":
        wrong.append(f"rotation {kind}")
    if getattr(config, "mlp_bias", False):
        wrong.append("a bias in the MLP")
    if wrong:
        raise NotImplementedError(f"the fused decoder has no {', '.join(wrong)}")


def _fuse(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    bias = None
    if all(part.bias is not None for part in projections):
        bias = _join([cast(nn.Parameter, part.bias) for part in projections])
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=_join([part.weight for part in projections]),
        qkv_bias=bias,
        q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        o=attention.o_proj.weight.t(),
        o_bias=attention.o_proj.bias,
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=_join([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight.t(),
    )


@torch.no_grad()
def _join(parts: list[nn.Parameter]) -> Tensor:
    """The parts one below the other; each parameter becomes a view of its stretch.

    Parts that were joined before stay where they are: another decoder may be reading them.
    """
    ends = [part.data_ptr() + part.nbytes for part in parts[:-1]]
    storages = {part.untyped_storage().data_ptr() for part in parts}
    if len(storages) == 1 and ends == [part.data_ptr() for part in parts[1:]]:
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        return parts[0].detach().as_strided(shape, parts[0].stride())
    whole = torch.cat([part.detach() for part in parts])
    stretches = torch.split(whole, [len(part) for part in parts])
    for part, stretch in zip(parts, stretches, strict=True):
        part.data = stretch
    return whole
