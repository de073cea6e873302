"""The names of a model's tensors in Megatron checkpoints, which are not those of its parameters.

Stock specs give a norm the name it has where it is part of the projection after it. Of a model whose
layers are all alike, the tensors of one name are one tensor with the layers as its first axis; of one
with experts each layer has names of its own.
"""

import re
from dataclasses import dataclass

from slime.checkpoint.dims import ModelDims

FUSED_QKV_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
FUSED_MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
FUSED_MLA_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
POST_NORMS = {
    "self_attention.linear_proj.post_layernorm.": "post_self_attn_layernorm.",
    "mlp.linear_fc2.post_layernorm.": "post_mlp_layernorm.",
}
# Of a layer's experts gate and up are saved apart, so that any cut of them can be loaded.
GATE_UP_STACK = "mlp.experts.weight1"
GATE_UP_PARTS = ("gate", "up")

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a checkpoint.

    Attributes:
        key: its name there.
        layer: its index along the first axis, where the layers share a tensor; else None.
        num_layers: the length of that axis.
    """

    key: str
    layer: int | None = None
    num_layers: int = 1

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The whole shape there of a tensor of this shape."""
        return shape if self.layer is None else (self.num_layers, *shape)

    def offsets(self, offsets: tuple[int, ...]) -> tuple[int, ...]:
        """Where a part of the tensor stands there."""
        return offsets if self.layer is None else (self.layer, *offsets)

    def sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The size there of a part of this size."""
        return sizes if self.layer is None else (1, *sizes)


def saved_place(name: str, dims: ModelDims) -> Place:
    """The place of the parameter with this global Megatron name."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return Place(name)
    index, inner = int(found[1]), _renamed(found[2], dims, int(found[1]))
    if dims.moe is not None:
        return Place(f"decoder.layers.{index}.{inner}")
    return Place(f"decoder.layers.{inner}", index, dims.num_layers)


def _renamed(name: str, dims: ModelDims, index: int) -> str:
    renames = dict(POST_NORMS) | (FUSED_MLA_NORMS if dims.mla is not None else FUSED_QKV_NORM)
    if not dims.is_moe_layer(index):
        renames |= FUSED_MLP_NORM
    return _replaced(name, renames)


def _replaced(name: str, renames: dict[str, str]) -> str:
    for prefix, other in renames.items():
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name


# The projections of experts: the name of their stack, Megatron's.
_EXPERT_LAYERS = {GATE_UP_STACK: "linear_fc1", "mlp.experts.weight2": "linear_fc2"}


def stock_places(name: str, dims: ModelDims) -> tuple[Place, ...]:
    """Where stock Megatron may have the parameter of this global name, other than `saved_place`.

    Its experts are a stack with gate above up, its layers without TransformerEngine name a norm before
    experts as if there were one MLP, and layers of one kind may share their tensors, or not.
    """
    found = _LAYER.fullmatch(name)
    if found is None:
        return ()
    inner, index = found[2], int(found[1])
    if inner in _EXPERT_LAYERS:
        names = (f"mlp.experts.experts.{_EXPERT_LAYERS[inner]}.weight",)
    else:
        names = (_renamed(inner, dims, index), _replaced(inner, FUSED_MLP_NORM))
    return tuple(
        place
        for word in dict.fromkeys(names)
        for place in (
            Place(f"decoder.layers.{index}.{word}"),
            Place(f"decoder.layers.{word}", index, dims.num_layers),
        )
    )


def rank_names(name: str, dims: ModelDims) -> tuple[str, ...]:
    """Names that the parameter of this global Megatron name may have in the file of a rank.

    They are relative to the layer, of which such a file has its own count. A norm stands by itself or is
    part of the projection after it, as the layers were made without TransformerEngine or with it.
    """
    found = _LAYER.fullmatch(name)
    if found is None:
        return (name,)
    inner, index = found[2], int(found[1])
    return tuple(dict.fromkeys((inner, _renamed(inner, dims, index))))


def rank_expert_names(name: str, number: int) -> tuple[str, ...]:
    """Names that one expert's part of the stack of this global Megatron name may have there.

    Args:
        number: of the expert among the rank's own.

    Example:
        rank_expert_names("decoder.layers.7.mlp.experts.weight2", 3) ==
        ("mlp.experts.linear_fc2.weight3", "mlp.experts.local_experts.3.linear_fc2.weight")
    """
    found = _LAYER.fullmatch(name)
    assert found is not None, name
    layer = _EXPERT_LAYERS[found[2]]
    return (
        f"mlp.experts.{layer}.weight{number}",
        f"mlp.experts.local_experts.{number}.{layer}.weight",
    )
