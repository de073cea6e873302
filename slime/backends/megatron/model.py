"""The model of one rank: GPTModel with our layers, wrapped for precision and data parallelism."""

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import core_transformer_config_from_args

from slime.backends.megatron.layers.dense import PackedRotary
from slime.backends.megatron.passes.critic import add_value_head
from slime.backends.megatron.process.parallel import objects_of_all_stages
from slime.backends.megatron.specs.blocks import block_spec
from slime.backends.megatron.specs.parts import chosen_parts
from slime.backends.megatron.specs.user_models import layers_of, model_of
from slime.backends.megatron.state.named_weights import Architecture, global_weights
from slime.checkpoint.convert import check_hf_against_flags
from slime.checkpoint.hf import read_hf_config
from slime.checkpoint.mapping import ModelDims, load_mapping
from slime.config.config import Config
from slime.errors import ConfigError
from slime.plugins import spec_path
from slime.registry import LAYERS


def build_model(
    args: argparse.Namespace,
    config: Config,
    *,
    architecture: Architecture,
    device: torch.device,
    is_critic: bool = False,
) -> list[DistributedDataParallel]:
    """This rank's part of the model with gradient buffers; its weights are not set yet.

    Args:
        is_critic: give it a value head instead of the output layer.

    Returns:
        One chunk, or one per virtual pipeline stage.
    """
    transformer = core_transformer_config_from_args(args)
    num_chunks = args.virtual_pipeline_model_parallel_size
    stages = [None] if num_chunks is None else list(range(num_chunks))
    chunks = [_build_chunk(args, config, transformer, architecture, stage) for stage in stages]
    for chunk in chunks:
        if is_critic:
            add_value_head(chunk, transformer)
        chunk.to(device)
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    _freeze(chunks, config)
    if args.fp16 or args.bf16:
        chunks = [Float16Module(transformer, chunk) for chunk in chunks]
    # Later chunks' backward passes come first; cut into buckets they would wait for each other.
    return [
        DistributedDataParallel(transformer, ddp_config(args), chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


def _build_chunk(
    args: argparse.Namespace,
    config: Config,
    transformer: TransformerConfig,
    architecture: Architecture,
    vp_stage: int | None,
) -> torch.nn.Module:
    ignores_virtual = vp_stage is None
    pre = parallel_state.is_pipeline_first_stage(ignore_virtual=ignores_virtual, vp_stage=vp_stage)
    post = parallel_state.is_pipeline_last_stage(ignore_virtual=ignores_virtual, vp_stage=vp_stage)
    if config.custom_model_provider_path:
        model = model_of(config.custom_model_provider_path, pre, post, vp_stage)
    else:
        model = _gpt_model(args, transformer, architecture, pre, post, vp_stage)
    _rotate_packs(model)
    return model


def _freeze(chunks: Sequence[torch.nn.Module], config: Config) -> None:
    """Leave out of training what --only-train-params-name-list or --freeze-params-name-list say.

    Raises:
        ConfigError: a pattern matches no parameter, or nothing is left to train.
    """
    names = {
        name: weight
        for name, weight in global_weights(chunks)
        if isinstance(weight, torch.nn.Parameter)
    }
    everywhere = sorted(set(chain.from_iterable(objects_of_all_stages(list(names)))))
    for patterns, trains in (
        (config.only_train_params_name_list, True),
        (config.freeze_params_name_list, False),
    ):
        if not patterns:
            continue
        if unused := [p for p in patterns if not any(re.search(p, name) for name in everywhere)]:
            raise ConfigError(
                f"{unused[0]!r} matches no parameter; names look like {everywhere[0]}."
            )
        for name, parameter in names.items():
            is_matched = any(re.search(pattern, name) for pattern in patterns)
            parameter.requires_grad_(is_matched == trains)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ConfigError(
            "All parameters are frozen, at least those of one pipeline stage; nothing is left to "
            "train there."
        )


def bare_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside its wrappers."""
    while isinstance(model, DistributedDataParallel | Float16Module):
        model = cast(torch.nn.Module, model.module)
    return model


def ddp_config(args: argparse.Namespace) -> DistributedDataParallelConfig:
    """Settings of gradient buffers and their reduction, from the arguments of the same name."""
    names = {field.name for field in dataclasses.fields(DistributedDataParallelConfig)}
    values = {name: value for name, value in vars(args).items() if name in names}
    values |= {
        "grad_reduce_in_fp32": args.accumulate_allreduce_grads_in_fp32,
        "check_for_nan_in_grad": args.check_for_nan_in_loss_and_grad,
        "num_buckets": args.ddp_num_buckets,
        "bucket_size": args.ddp_bucket_size,
        "pad_buckets_for_high_nccl_busbw": args.ddp_pad_buckets_for_high_nccl_busbw,
        "reduce_scatter_with_fp32_accumulation": args.ddp_reduce_scatter_with_fp32_accumulation,
        "average_in_collective": False,
    }
    return DistributedDataParallelConfig(**values)


def _gpt_model(
    args: argparse.Namespace,
    transformer: TransformerConfig,
    architecture: Architecture,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> GPTModel:
    return GPTModel(
        config=transformer,
        transformer_layer_spec=_layer_spec(args, transformer, architecture, vp_stage),
        vocab_size=architecture.dims.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
    )


def _rotate_packs(model: torch.nn.Module) -> None:
    """Let a model that has Megatron's rotary angles have those of packs, of the same numbers."""
    rotary = getattr(model, "rotary_pos_emb", None)  # multi-latent attention has its own
    if type(rotary) is RotaryEmbedding:
        rotary.__class__ = PackedRotary


def _layer_spec(
    args: argparse.Namespace,
    transformer: TransformerConfig,
    architecture: Architecture,
    vp_stage: int | None,
) -> Any:
    """What `--spec module function` returns; else the layers of the architecture."""
    if args.spec is not None:
        where = f"--spec {' '.join(args.spec)}"
        return layers_of(where, spec_path(args.spec), args, transformer, vp_stage)
    model_type = architecture.model_type
    if model_type in LAYERS:
        path = LAYERS.path(model_type)
        return layers_of(f"layers of {model_type}, {path}", path, args, transformer, vp_stage)
    return block_spec(transformer, vp_stage=vp_stage, parts=chosen_parts(args))


def find_architecture(config: Config, args: argparse.Namespace) -> Architecture:
    """Mapping and sizes of the model in --hf-checkpoint, which the arguments have to describe.

    Raises:
        ConfigError: they describe another one.
        CheckpointError: the folder is none, or of an architecture without a mapping.
    """
    if config.hf_checkpoint is None:
        raise ConfigError(
            "The trainer needs --hf-checkpoint: it names the architecture of the weights."
        )
    hf_config = read_hf_config(config.hf_checkpoint)
    check_hf_against_flags(hf_config, args)
    dims = ModelDims.from_hf_config(hf_config)
    dims = dims.with_padded_vocab(_padded_vocab_size(args, dims.vocab_size))
    args.padded_vocab_size = dims.padded_vocab_size
    model_type = str(hf_config.get("model_type"))
    return Architecture(model_type, load_mapping(model_type), dims)


def _padded_vocab_size(args: argparse.Namespace, vocab_size: int) -> int:
    """Rows of the embedding: as given, else the vocabulary rounded up as Megatron does."""
    if args.padded_vocab_size is not None:
        return args.padded_vocab_size
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return math.ceil(vocab_size / multiple) * multiple
