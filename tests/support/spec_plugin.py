"""Layers and models as users give them, by --spec and --custom-model-provider-path; wrong ones too."""

import argparse
from typing import Any

CALLS: list[int | None] = []


def plain_layers(args: argparse.Namespace, config: Any, vp_stage: int | None = None) -> Any:
    """The layers that slime has anyway; notes that it was called."""
    from slime.backends.megatron.specs import block_spec

    assert args.num_layers == config.num_layers
    CALLS.append(vp_stage)
    return block_spec(config, vp_stage=vp_stage)


def one_layer(args: argparse.Namespace, config: Any, vp_stage: int | None) -> Any:
    """The spec of one layer, for all of them."""
    return plain_layers(args, config, vp_stage).layer_specs[0]


def two_arguments(args: argparse.Namespace, config: Any) -> Any:
    """Wants one argument less than it is given."""
    return plain_layers(args, config)


def nothing(args: argparse.Namespace, config: Any, vp_stage: int | None) -> None:
    """Forgets to return."""


def half_of_the_layers(args: argparse.Namespace, config: Any, vp_stage: int | None) -> Any:
    """Leaves layers out."""
    block = plain_layers(args, config, vp_stage)
    del block.layer_specs[len(block.layer_specs) // 2 :]
    return block


def narrow_norms(args: argparse.Namespace, config: Any, vp_stage: int | None) -> Any:
    """Norms of one number each, which would be filled with 64."""
    from slime.backends.megatron.layers import RMSNorm

    block = plain_layers(args, config, vp_stage)
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = lambda config, hidden_size, eps: RMSNorm(config, 1, eps)
    return block


def provide(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> Any:
    """A GPTModel made as in Megatron's own examples: the arguments are global."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = core_transformer_config_from_args(args)
    CALLS.append(vp_stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=plain_layers(args, config, vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
    )


def provide_nothing(pre_process: bool, post_process: bool) -> None:
    """Forgets to return."""


def provide_a_matrix(pre_process: bool, post_process: bool) -> Any:
    """A module that is no language model."""
    import torch

    return torch.nn.Linear(2, 2)


def provide_without_output(pre_process: bool, post_process: bool) -> Any:
    """A model without its last part."""
    return provide(pre_process, False)


def provide_from_one_argument(pre_process: bool) -> Any:
    """Wants one argument less than it is given."""
    return provide(pre_process, True)
