"""Megatron's arguments: the user's words through its own parser, and values our trainer needs."""

import argparse
import contextlib
import functools
import io
import logging
import os
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training.arguments import add_megatron_arguments, validate_args

from slime.backends.megatron.process.stock import without_warnings
from slime.config.config import Config
from slime.config.schedule import num_train_steps
from slime.errors import ConfigError

logger = logging.getLogger(__name__)

_DEFAULT_SEQ_LENGTH = 4096

# What pre-training has by default and reinforcement learning must not have unless asked for.
_DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "micro_batch_size": 1,
    "transformer_impl": "local",  # our layers, unless the other is asked for
    "moe_router_load_balancing_type": "none",
    "moe_router_bias_update_rate": 0.0,  # Megatron would move the bias at every step
    "moe_router_dtype": "fp32",  # as the engines choose experts
}

# Set whatever the words say; facts that users cannot change belong here.
_FORCED: dict[str, Any] = {
    "use_distributed_optimizer": True,
    "calculate_per_token_loss": True,  # Megatron then divides nothing: our losses are sums already
    "check_for_nan_in_loss_and_grad": False,  # we skip the step, it would end the run
    "perform_initialization": False,  # weights are always loaded
    "ckpt_format": "torch_dist",
    "moe_token_dispatcher_type": "alltoall",  # the only one that takes variable lengths
    "moe_enable_deepep": False,  # of another dispatcher
    "moe_grouped_gemm": False,  # TransformerEngine's; ours is always grouped
    "moe_permute_fusion": False,  # TransformerEngine
    "moe_router_fusion": False,  # TransformerEngine
    "use_precision_aware_optimizer": False,  # TransformerEngine's; see host_optimizer.py
    "gradient_accumulation_fusion": True,  # see gradient_accumulation.py
    "bias_dropout_fusion": False,  # no bias, no dropout: one addition
    "apply_rope_fusion": False,  # TransformerEngine
    "masked_softmax_fusion": False,  # Apex
    "no_persist_layer_norm": True,  # Apex
    "use_gloo_process_groups": False,  # for checkpoint formats we do not write
    "tokenizer_type": "NullTokenizer",
    "mock_data": False,
}


def parse_megatron_args(
    config: Config, *, device: torch.device, rank: int, world_size: int
) -> argparse.Namespace:
    """Megatron's validated namespace for this rank.

    Raises:
        ConfigError: a word Megatron does not know or a combination it refuses, with its own
        message.
    """
    args = _parse(config.megatron_argv)
    args.rank, args.world_size = rank, world_size
    load, save = args.load, args.save
    _set_required_values(args, config, device)
    for name, value in _FORCED.items():
        setattr(args, name, value)
    _refuse_unbuilt_args(args)
    _choose_layers(args, device)
    if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    offloads = args.optimizer_cpu_offload
    args.optimizer_cpu_offload = False  # Megatron's way asks for an optimizer of TransformerEngine
    _validate(args)
    args.optimizer_cpu_offload = offloads
    # validate_args resets this one; lengths differ from pack to pack.
    args.variable_seq_lengths = True
    args.load, args.save = load, save
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"Megatron's parser: {message}")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    args = _parser().parse_args(list(words))
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    return args


@functools.cache
def _parser() -> _Parser:
    parser = _Parser(allow_abbrev=False, add_help=False)
    with without_warnings():
        add_megatron_arguments(parser)
    parser.set_defaults(**_DEFAULTS)
    return parser


def _set_required_values(args: argparse.Namespace, config: Config, device: torch.device) -> None:
    """Values validate_args asks for, which slime keeps elsewhere or has no use for."""
    args.fp16 = config.fp16 and device.type == "cuda"
    # fp32 on CPU: half precision is slower there, and log-probs then agree with the engines to
    # 1e-5.
    args.bf16 = device.type == "cuda" and not config.fp16 and config.bf16 is not False
    args.seq_length = args.seq_length or _DEFAULT_SEQ_LENGTH
    args.max_position_embeddings = max(args.max_position_embeddings or 0, args.seq_length)
    args.train_iters, args.train_samples = _train_iters(config), None
    if args.num_experts and isinstance(args.moe_layer_freq, int):
        # As a list, whichever way it was written: it decides the names in checkpoints.
        args.moe_layer_freq = [int(i % args.moe_layer_freq == 0) for i in range(args.num_layers)]
    # Checkpoints are ours; Megatron would ask for intervals and look for files.
    args.load = args.save = args.data_path = None
    args.eval_micro_batch_size, args.eval_global_batch_size = 1, args.world_size


def _train_iters(config: Config) -> int:
    """Optimizer steps of the whole run, which stretches the learning-rate schedule."""
    if (steps := num_train_steps(config)) is None:
        raise ConfigError(
            "The trainer needs num_rollout, rollout_batch_size and global_batch_size; give "
            "--num-rollout (or --num-epoch), --rollout-batch-size and --global-batch-size (or "
            "--num-steps-per-rollout)."
        )
    return steps


def refuse_unbuilt(config: Config) -> None:
    """Name the flags that the backend does not know yet, instead of leaving them without effect."""
    if config.use_stateless_adam:
        raise ConfigError("--use-stateless-adam is not supported yet.")
    if config.mtp_num_layers or config.enable_mtp_training:
        raise ConfigError("Multi-token prediction (--mtp-num-layers) is not supported yet.")


def _refuse_unbuilt_args(args: argparse.Namespace) -> None:
    if args.async_save:
        raise ConfigError("--async-save is not supported yet; leave it out.")
    _refuse_recompute(args)
    if args.multi_latent_attention:
        _require_sequence_parallel(args, "Multi-latent attention")
    _refuse_moe_args(args)
    if args.attention_dropout > 0.0:
        raise ConfigError(
            f"--attention-dropout {args.attention_dropout}: packed attention has no dropout; use 0."
        )
    if args.normalization != "RMSNorm":
        raise ConfigError(f"--normalization {args.normalization}: only RMSNorm is supported.")
    if args.position_embedding_type != "rope" and not args.use_rotary_position_embeddings:
        raise ConfigError(
            f"--position-embedding-type {args.position_embedding_type}: only rope is supported; "
            "add --use-rotary-position-embeddings."
        )


def _choose_layers(args: argparse.Namespace, device: torch.device) -> None:
    """TransformerEngine's modules where they are asked for and can be had, else ours."""
    if args.transformer_impl == "local":
        return
    if args.transformer_impl != "transformer_engine":
        raise ConfigError(
            f"--transformer-impl {args.transformer_impl}: only local (slime's own layers) and "
            "transformer_engine are supported."
        )
    if args.multi_latent_attention:
        raise ConfigError(
            "--transformer-impl transformer_engine: latent attention of packs is slime's own; leave "
            "the flag out."
        )
    if device.type == "cpu" or not HAVE_TE:
        logger.warning(
            "--transformer-impl transformer_engine, but %s: slime's own layers are used",
            "there is no GPU" if device.type == "cpu" else "there is no TransformerEngine",
        )
        args.transformer_impl = "local"
    elif not args.bf16:
        raise ConfigError(
            "--transformer-impl transformer_engine: its attention of packs computes in bfloat16 only; "
            "give --bf16, or leave the flag out."
        )
    elif args.deterministic_mode:
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"


# Recomputing these alone is done with code that Megatron compiles at run time or has from
# TransformerEngine.
_NO_RECOMPUTE = {"layernorm", "moe_act", "mla_up_proj"}


def _refuse_recompute(args: argparse.Namespace) -> None:
    if unbuilt := sorted(_NO_RECOMPUTE.intersection(args.recompute_modules or ())):
        raise ConfigError(
            f"--recompute-modules {' '.join(unbuilt)}: not supported; of a layer's parts core_attn, "
            "mlp, moe and shared_experts can be recomputed, or all with --recompute-granularity "
            "full."
        )


def _refuse_moe_args(args: argparse.Namespace) -> None:
    if not args.num_experts:
        return
    balancing = _as_list(args.moe_router_load_balancing_type)
    if changed := {"sinkhorn", "quantile_balancing"}.intersection(balancing):
        raise ConfigError(
            f"--moe-router-load-balancing-type {changed.pop()}: experts would be chosen in another "
            "way than the engines choose them; use none."
        )
    coefficients = [x for x in _as_list(args.moe_aux_loss_coeff) if x]
    if coefficients and balancing != ["none"]:
        raise ConfigError(
            f"--moe-aux-loss-coeff {coefficients[0]}: losses that balance experts are not supported: "
            "how they add to slime's losses, which are sums over a step, was not verified; use 0."
        )
    _require_sequence_parallel(args, "Mixtures of experts")


def _require_sequence_parallel(args: argparse.Namespace, what: str) -> None:
    size = args.tensor_model_parallel_size
    if size > 1 and not args.sequence_parallel:
        raise ConfigError(
            f"{what} with --tensor-model-parallel-size {size} needs --sequence-parallel; add it."
        )


def _as_list(value: Any) -> list[Any]:
    return cast(list[Any], value) if isinstance(value, list) else [value]


def _validate(args: argparse.Namespace) -> None:
    # Megatron prints some 500 lines of arguments; the run's own config.json has what matters.
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), without_warnings():
            validate_args(args)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"Megatron refuses its arguments: {error}") from error
    logger.debug("%s", output.getvalue())
