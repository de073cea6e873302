"""Experts that a folder keeps stacked in one tensor, under the names of the published checkpoints.

transformers 5 holds the experts of a layer in two tensors, `mlp.experts.gate_up_proj` [E, 2f, H]
(gate above up) and `mlp.experts.down_proj` [E, H, f], without `.weight`. Its `save_pretrained` takes
them apart again, unless told to keep them; published folders have a tensor for each expert.
"""

import re
from dataclasses import dataclass

_STACK = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<kind>gate_up_proj|down_proj)")


@dataclass(frozen=True)
class ExpertPart:
    """Where in a stack the matrix of one expert lies.

    Attributes:
        stack: name of the stacked tensor.
        rows: of dimension 1.
        shape: of the matrix.
    """

    stack: str
    expert: int
    rows: slice
    shape: tuple[int, int]


def is_stack(name: str) -> bool:
    """Whether a tensor of this name holds all experts of a layer."""
    return _STACK.fullmatch(name) is not None


def parts_of_stack(name: str, shape: tuple[int, ...]) -> dict[str, ExpertPart]:
    """Published name -> part, of all matrices in the stack `name` of this shape [E, rows, columns].

    Example:
        parts_of_stack("model.layers.0.mlp.experts.down_proj", (2, 8, 4)) has the keys
        model.layers.0.mlp.experts.0.down_proj.weight and model.layers.0.mlp.experts.1.down_proj.weight
    """
    found = _STACK.fullmatch(name)
    assert found is not None, name
    assert len(shape) == 3, (name, shape)
    num_experts, num_rows, width = shape
    half = num_rows // 2
    rows = {"down_proj": slice(0, num_rows)}
    if found["kind"] == "gate_up_proj":
        rows = {"gate_proj": slice(0, half), "up_proj": slice(half, num_rows)}
    return {
        f"{found['experts']}.{e}.{word}.weight": ExpertPart(
            name, e, part, (part.stop - part.start, width)
        )
        for e in range(num_experts)
        for word, part in rows.items()
    }
