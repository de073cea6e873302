"""Which modules make the layers of a model: ours, TransformerEngine's, the user's own.

The names here are for layers of a model's own, as in `slime_plugins/models`.
"""

from slime.backends.megatron.specs.blocks import LayerStyle, block_spec
from slime.backends.megatron.specs.parts import Parts, chosen_parts

__all__ = ["LayerStyle", "Parts", "block_spec", "chosen_parts"]
