"""TrainConfig: how the trainer's model is built, run and hooked into."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slime.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training."""

    qwen_gdn_backend: Literal["fla", "flashqla"] = flag(
        "fla", "Kernels of the linear attention in Qwen3-Next and Qwen3.5."
    )
    train_env_vars: Mapping[str, Any] = flag({}, "Environment of the train actors, as JSON.")
    train_timeout_s: float = flag(
        7200.0, "Deadline of one call to the train actors (update, save), in seconds.", above=0
    )
    release_train: bool = flag(
        False, "End the train actors during each rollout and start them again from a checkpoint."
    )
    custom_model_provider_path: str | None = flag(
        None, "Function that builds the model: fn(pre_process, post_process[, vp_stage])."
    )
    recompute_loss_function: bool = flag(
        False, "Recompute the loss in the backward pass: less memory, more time."
    )
    log_probs_chunk_size: int = flag(
        -1, "Tokens per chunk of the log-prob and entropy computation; -1 = by memory."
    )
    only_train_params_name_list: tuple[str, ...] | None = flag(
        None, "Train only parameters whose name matches one of these regular expressions."
    )
    freeze_params_name_list: tuple[str, ...] | None = flag(
        None, "Freeze parameters whose name matches one of these regular expressions."
    )
    freeze_indexer: bool = flag(False, "Freeze the indexer of DeepSeek sparse attention.")
    allgather_cp: bool = flag(
        False, "Contiguous context-parallel layout, for DeepSeek sparse attention."
    )
    custom_megatron_init_path: str | None = flag(
        None, "Function called after Megatron is initialised: fn(args)."
    )
    custom_megatron_before_log_prob_hook_path: str | None = flag(
        None, "Function called before each log-prob pass: fn(args, model, store_prefix)."
    )
    custom_megatron_before_train_step_hook_path: str | None = flag(
        None,
        "Function called before each optimizer step: "
        "fn(args, rollout_id, step_id, model, optimizer, opt_param_scheduler).",
    )
    megatron_deepgemm_forward_layers: tuple[int, ...] | None = flag(
        None, "Layers whose dense GEMMs run DeepGEMM's block FP8 in the forward pass."
    )
    megatron_deepgemm_forward_modules: tuple[str, ...] | None = flag(
        None, "Modules whose dense GEMMs run DeepGEMM's block FP8 in the forward pass."
    )
    megatron_deepgemm_moe_forward_layers: tuple[int, ...] | None = flag(
        None, "Layers whose expert GEMMs run DeepGEMM's block FP8 in the forward pass."
    )
    megatron_deepgemm_moe_forward_modules: tuple[str, ...] | None = flag(
        None, "Modules whose expert GEMMs run DeepGEMM's block FP8 in the forward pass."
    )
    enable_mtp_training: bool = flag(False, "Train the multi-token-prediction layers.")
