"""GLM-4, dense: attention and MLP each end in a norm of their own, before the residual."""

import argparse

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from slime.backends.megatron.specs import LayerStyle, block_spec, chosen_parts


def get_glm_spec(
    args: argparse.Namespace, config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, for `--spec slime_plugins.models.glm4 get_glm_spec`."""
    style = LayerStyle(has_post_norms=True)
    return block_spec(config, style, vp_stage=vp_stage, parts=chosen_parts(args))
