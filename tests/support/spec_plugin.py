"""A layer spec as users give it by --spec."""

import argparse
from typing import Any

CALLS: list[int | None] = []


def plain_layers(args: argparse.Namespace, config: Any, vp_stage: int | None = None) -> Any:
    """The layers that slime has anyway; notes that it was called."""
    from slime.backends.megatron.specs import LayerStyle, block_spec

    assert args.num_layers == config.num_layers
    CALLS.append(vp_stage)
    return block_spec(config, LayerStyle(), vp_stage=vp_stage)
