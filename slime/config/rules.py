"""The rules a resolved configuration keeps; each says what is wrong and what to change."""

import ipaddress
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from slime.config.agent import AGENT_GENERATE
from slime.config.async_rules import fully_async
from slime.config.checkpoints import has_megatron_checkpoint, is_hf_folder
from slime.config.config import Config, slime_options
from slime.config.engine_rules import engine_sizes, external_engines, pausing, routing
from slime.config.environments import ENVIRONMENT_GENERATE
from slime.config.foreign import megatron_values
from slime.config.hf_check import check_against_hf
from slime.config.layout import data_parallel_size, micro_batch_multiple
from slime.config.parallel_rules import parallel_sizes
from slime.config.problems import Problems
from slime.config.schedule import schedule
from slime.config.states import EMBEDDED_ENGINE_OPTIONS
from slime.config.weight_rules import quantized_weights, weights_through_files
from slime.plugins import BUILT_IN_PATHS, nearest
from slime.registry import REWARDS

logger = logging.getLogger(__name__)

DEFAULT_DATA_SOURCE = "slime.rollout.data_source.RolloutDataSourceWithBuffer"
MAX_PORT = 65535

# flag -> the flag without which it does nothing.
_NEEDS = {
    "max_tokens_per_gpu": "use_dynamic_batch_size",
    "balance_by_flops": "use_dynamic_batch_size",
    "max_weight_staleness": "fully_async",
    "mask_offpolicy_in_partial_rollout": "partial_rollout",
    "tis_clip": "use_tis",
    "tis_clip_low": "use_tis",
    "use_unbiased_kl": "use_kl_loss",
    "ref_ckpt_step": "ref_load",
    "tb_project_name": "use_tensorboard",
    "tb_experiment_name": "use_tensorboard",
    "wandb_project": "use_wandb",
    "wandb_run_id": "use_wandb",
    "wandb_mode": "use_wandb",
    "trackio_project": "use_trackio",
    "trackio_space_id": "use_trackio",
    "load_debug_rollout_data_subsample": "load_debug_rollout_data",
    "eval_config": "eval_interval",
    "eval_prompt_data": "eval_interval",
    "save_hf": "save",
    "update_weight_disk_keep_files": "update_weight_disk_dir",
    "custom_update_weight_post_write_path": "update_weight_disk_dir",
}
# flag -> (the flag, its value) without which it does nothing.
_NEEDS_VALUE = {
    "update_weight_disk_dir": ("update_weight_transport", "disk"),
    "update_weight_local_checkpoint_dir": ("update_weight_transport", "disk"),
    "update_weight_delta_encoding": ("update_weight_mode", "delta"),
    "update_weight_delta_checksum": ("update_weight_mode", "delta"),
}


def check_rules(config: Config, problems: Problems) -> None:
    """Note every rule that is broken; one that asks for a wrong value stops there."""
    for rule in RULES:
        with problems.caught():
            for message in rule(problems.readable(config)):
                problems.add(message)
    with problems.caught():
        _warn_without_effect(problems.readable(config))


def _length_of_run(config: Config) -> Iterator[str]:
    if config.num_rollout is None and config.num_epoch is None:
        yield "say how long to run: --num-rollout or --num-epoch is missing"
    if config.num_rollout is None and config.disable_rollout_global_dataset:
        yield "--num-epoch needs a dataset to count; give --num-rollout instead"


def _batch_sizes(config: Config) -> Iterator[str]:
    prompts, size = config.rollout_batch_size or 0, config.global_batch_size or 0
    total = prompts * config.n_samples_per_prompt
    if total % size:
        yield (
            f"--global-batch-size {size} does not divide --rollout-batch-size x "
            f"--n-samples-per-prompt = {total}; try {nearest_divisors(total, size)}"
        )
    submitted = config.over_sampling_batch_size or 0
    if submitted < prompts:
        yield (
            f"--over-sampling-batch-size {submitted} is less than --rollout-batch-size {prompts}; "
            "raise it, or leave it out"
        )
    if config.use_dynamic_batch_size and config.max_tokens_per_gpu is None:
        yield (
            "--use-dynamic-batch-size needs --max-tokens-per-gpu: the most tokens of a micro-batch"
        )


def _ranks_share_batch(config: Config) -> Iterator[str]:
    if config.debug_rollout_only:
        return
    size = config.global_batch_size or 0
    ranks = data_parallel_size(config) * micro_batch_multiple(config)
    if size < ranks:
        yield (
            f"--global-batch-size {size} is less than the {ranks} {_what_shares(config)}, so some "
            f"would train on nothing; raise it to {ranks} or use fewer ranks"
        )
    per_pass = ranks * config.micro_batch_size
    if size >= ranks and not config.use_dynamic_batch_size and size % per_pass:
        yield (
            f"--global-batch-size {size} is no multiple of {_what_shares(config)} x "
            f"--micro-batch-size = {ranks} x {config.micro_batch_size} = {per_pass}; try "
            f"{max(size - size % per_pass, per_pass)}, or --use-dynamic-batch-size"
        )


def _what_shares(config: Config) -> str:
    stages = " x pipeline stages (interleaved)" if micro_batch_multiple(config) > 1 else ""
    return f"data-parallel ranks{stages}"


def nearest_divisors(total: int, wanted: int) -> str:
    """`64 or 128`: the divisors of `total` next to `wanted`, for messages."""
    divisors = [size for size in range(1, total + 1) if total % size == 0]
    below = [size for size in divisors if size < wanted][-1:]
    above = [size for size in divisors if size > wanted][:1]
    return " or ".join(str(size) for size in below + above)


def _algorithm(config: Config) -> Iterator[str]:
    if config.kl_coef != 0.0 and config.kl_loss_coef != 0.0:
        yield (
            f"--kl-coef {config.kl_coef} and --kl-loss-coef {config.kl_loss_coef}: the KL goes "
            "either into the reward or into the loss; set one of them to 0"
        )
    elif config.kl_coef != 0.0 and not config.advantage_estimator.startswith("reinforce_plus_plus"):
        yield (
            f"--kl-coef {config.kl_coef} has no effect with --advantage-estimator "
            f"{config.advantage_estimator}; give --use-kl-loss with --kl-loss-coef, or a "
            "reinforce_plus_plus estimator"
        )
    elif config.kl_loss_coef != 0.0 and not config.use_kl_loss:
        yield (f"--kl-loss-coef {config.kl_loss_coef} does nothing without --use-kl-loss; add it")
    if config.use_rollout_logprobs and config.use_tis:
        yield (
            "--use-rollout-logprobs and --use-tis exclude each other: the first takes the "
            "engine's log-probs as the old ones, so there is nothing to correct"
        )
    if config.get_mismatch_metrics and config.custom_tis_function_path is None:
        yield "--get-mismatch-metrics needs --custom-tis-function-path"
    if config.get_mismatch_metrics and config.loss_type != "policy_loss":
        yield f"--get-mismatch-metrics does nothing with --loss-type {config.loss_type}; leave it out"
    path = config.custom_tis_function_path
    if config.get_mismatch_metrics and not config.use_tis and path in BUILT_IN_PATHS:
        yield (
            f"--get-mismatch-metrics measures with a function of your own; {path} is built in and "
            "works with --use-tis only"
        )
    if config.eps_clip_c is not None and config.eps_clip_c <= 1.0:
        yield f"--eps-clip-c must be above 1, found {config.eps_clip_c}"
    if config.tis_clip_low > config.tis_clip:
        yield (f"--tis-clip-low {config.tis_clip_low} is above --tis-clip {config.tis_clip}")
    records = config.use_routing_replay and not config.use_rollout_routing_replay
    has_pass = config.loss_type == "policy_loss" or (
        config.loss_type == "custom_loss" and not config.disable_compute_advantages_and_returns
    )
    if records and (not has_pass or config.use_rollout_logprobs):
        yield (
            "--use-routing-replay replays the experts of the log-prob pass, which these flags leave "
            "out (--use-rollout-logprobs, or a loss without advantages); use "
            "--use-rollout-routing-replay"
        )
    own, has_path = config.loss_type == "custom_loss", config.custom_loss_function_path is not None
    if own != has_path:
        yield "--loss-type custom_loss and --custom-loss-function-path need each other; give both"
    if (
        config.custom_pg_loss_reducer_function_path is not None
        and config.loss_type != "policy_loss"
    ):
        yield (
            f"--custom-pg-loss-reducer-function-path does nothing with --loss-type "
            f"{config.loss_type}; leave it out"
        )


def _rollout(config: Config) -> Iterator[str]:
    for name, value in (("rollout_top_p", config.rollout_top_p), ("eval_top_p", config.eval_top_p)):
        if value is not None and not 0.0 < value <= 1.0:
            yield f"{_flag(name)} must be above 0 and at most 1, found {value}"
    for name, value in (("rollout_top_k", config.rollout_top_k), ("eval_top_k", config.eval_top_k)):
        if value is not None and value != -1 and value < 1:
            yield f"{_flag(name)} must be at least 1, or -1 for all, found {value}"
    if config.rollout_top_k != -1:
        logger.warning(
            "--rollout-top-k %d: the trainer's log-probs are over the whole vocabulary, so they "
            "differ from the engine's",
            config.rollout_top_k,
        )
    if config.sglang_router_ip is not None and config.sglang_router_port is None:
        yield "--sglang-router-ip needs --sglang-router-port"


def _engines(config: Config) -> Iterator[str]:
    if config.debug_rollout_only and config.debug_train_only:
        yield (
            "--debug-rollout-only and --debug-train-only exclude each other "
            "(--load-debug-rollout-data implies the latter)"
        )
    deployments = {
        "--sglang-config": config.sglang_config,
        "--prefill-num-servers": config.prefill_num_servers,
        "--rollout-external-engine-addrs": config.rollout_external_engine_addrs,
    }
    given = [name for name, value in deployments.items() if value is not None]
    if len(given) > 1:
        yield f"{' and '.join(given)} exclude each other; give one"


def _engine_slots(config: Config) -> Iterator[str]:
    if config.rollout_num_gpus is None:
        yield (
            "--rollout-num-gpus is missing: device slots of all engines together (on CPU, engine "
            "processes); or share the trainer's with --colocate"
        )
        return
    size = config.rollout_num_gpus_per_engine
    if config.rollout_num_gpus % size:
        yield (
            f"--rollout-num-gpus {config.rollout_num_gpus} is no multiple of "
            f"--rollout-num-gpus-per-engine {size}"
        )
    pipeline = config.sglang_argv.get("pp_size", 1)
    if size % pipeline:
        yield (f"--sglang-pp-size {pipeline} does not divide --rollout-num-gpus-per-engine {size}")
    has_attention = config.sglang_argv.get("enable_dp_attention", False)
    if config.sglang_argv.get("dp_size", 1) > 1 and not has_attention:
        yield "--sglang-dp-size above 1 needs --sglang-enable-dp-attention"


def _engine_options(config: Config) -> Iterator[str]:
    is_embedded = config.rollout_engine == "embedded" or (
        config.rollout_engine == "auto" and config.device == "cpu"
    )
    unknown = sorted(set(config.sglang_argv) - set(EMBEDDED_ENGINE_OPTIONS))
    is_external = config.rollout_external_engine_addrs is not None  # another rule speaks of them
    if is_embedded and unknown and not is_external:
        names = ", ".join(_flag(f"sglang_{name}") for name in unknown)
        known = ", ".join(_flag(f"sglang_{name}") for name in EMBEDDED_ENGINE_OPTIONS)
        yield f"the embedded CPU engine has no {names}; leave it out; known: {known}"


def _rewards(config: Config) -> Iterator[str]:
    if config.group_rm and config.custom_rm_path is None:
        yield "--group-rm needs --custom-rm-path: no built-in reward takes a group"
    names = {config.rm_type, *(dataset.rm_type for dataset in config.eval_datasets)} - {None}
    for name in sorted(str(name) for name in names):
        bare = name.removeprefix("boxed_")
        if bare not in REWARDS:
            known = ", ".join(REWARDS.names())
            hint = nearest(bare, REWARDS.names())
            yield f"--rm-type {name}: no such reward{hint}; known: {known}"
        if bare == "remote_rm" and config.rm_url is None:
            yield "--rm-type remote_rm needs --rm-url, the address it asks"
        if bare == "judge" and (config.judge_url is None or config.judge_model is None):
            yield "--rm-type judge needs --judge-url, the endpoint it asks, and --judge-model"


def _sandbox(config: Config) -> Iterator[str]:
    if config.sandbox_wall_s < config.sandbox_cpu_s:
        yield (
            f"--sandbox-wall-s {config.sandbox_wall_s:g} is less than --sandbox-cpu-s "
            f"{config.sandbox_cpu_s}: a program could never use its processor seconds; give more"
        )


def _is_every_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _agents(config: Config) -> Iterator[str]:
    generates = config.custom_generate_function_path
    agent = config.agent_function_path
    if generates == AGENT_GENERATE and agent is None:
        yield f"--custom-generate-function-path {generates} needs --agent-function-path, the agent"
    if agent is not None and generates != AGENT_GENERATE:
        yield (
            f"--agent-function-path goes with {AGENT_GENERATE}, and --custom-generate-function-path "
            f"is {generates}; give one of them, or open a slime.agent.agent_session in your function"
        )
    if not config.agent_host or _is_every_address(config.agent_host):
        yield (
            f"--agent-host {config.agent_host!r} is no address that an agent can go to; give the one "
            "at which agents reach this node"
        )
    if config.agent_port > MAX_PORT:
        yield f"--agent-port {config.agent_port} is no port; give one up to {MAX_PORT}"


def _environments(config: Config) -> Iterator[str]:
    generates, path = config.custom_generate_function_path, config.environment_path
    if generates == ENVIRONMENT_GENERATE and path is None:
        yield f"--custom-generate-function-path {generates} needs --environment-path"
    if path is None:
        return
    if generates != ENVIRONMENT_GENERATE:
        yield (
            f"--environment-path goes with {ENVIRONMENT_GENERATE}, and what generates is {generates} "
            "(--custom-generate-function-path, or --agent-function-path); give one of them"
        )
    if config.apply_chat_template or any(d.apply_chat_template for d in config.eval_datasets):
        yield (
            "--environment-path: what an environment says first belongs into the prompt, and "
            "--apply-chat-template has closed it before; leave that out: messages are templated later"
        )


def _periods(config: Config) -> Iterator[str]:
    if config.save_interval is not None and config.save is None:
        yield (f"--save-interval {config.save_interval} needs --save, the folder of checkpoints")
    if config.eval_interval is not None and not config.eval_datasets:
        has_own_function = config.eval_function_path != config.rollout_function_path
        if not has_own_function:
            yield (
                f"--eval-interval {config.eval_interval} needs data: --eval-prompt-data name path, "
                "or --eval-config"
            )


def _precision(config: Config) -> Iterator[str]:
    if config.bf16 and config.fp16:
        yield "--bf16 and --fp16 exclude each other; give one"
    if config.bf16 and config.device == "cpu":
        logger.info("--bf16: on CPU the trainer computes in float32")


def _device(config: Config) -> Iterator[str]:
    if config.debug_train_only or config.rollout_num_gpus is None:
        return
    size, per_node = config.rollout_num_gpus_per_engine, config.num_gpus_per_node
    if size > per_node and size % per_node:
        yield (
            f"--rollout-num-gpus-per-engine {size} is neither within a node of --num-gpus-per-node "
            f"{per_node} slots nor a number of whole nodes; change one of them"
        )
    if config.device == "cuda" and config.sglang_argv.get("pp_size", 1) > 1:
        yield "--sglang-pp-size above 1: weights reach no pipeline stages of engines yet"


def _optimizer(config: Config) -> Iterator[str]:
    megatron = megatron_values(config.megatron_argv)
    fraction = megatron["optimizer_offload_fraction"]
    if not 0.0 <= fraction <= 1.0:
        yield f"--optimizer-offload-fraction {fraction} is no share; give a number from 0 to 1"
    if megatron["use_precision_aware_optimizer"] and not megatron["optimizer_cpu_offload"]:
        yield (
            "--use-precision-aware-optimizer without --optimizer-cpu-offload: moments of lower "
            "precision need TransformerEngine's Adam, which slime does without; leave it out"
        )


def _folders(config: Config) -> Iterator[str]:
    if config.hf_checkpoint is None:
        yield ("--hf-checkpoint is missing: the Hugging Face folder with tokenizer and config")
    elif not is_hf_folder(config.hf_checkpoint):
        yield (
            f"--hf-checkpoint {config.hf_checkpoint}: there is no config.json in such a folder; "
            "download the model first and give its local path"
        )
    for name in ("ref_load", "load"):
        folder: str | None = getattr(config, name)
        if folder in (None, config.hf_checkpoint) or config.debug_rollout_only:
            continue
        if not (is_hf_folder(folder) or has_megatron_checkpoint(folder)):
            yield (
                f"{_flag(name)} {folder}: neither a Megatron checkpoint nor a Hugging Face folder"
            )


def _model(config: Config) -> Iterator[str]:
    if config.hf_checkpoint is not None and is_hf_folder(config.hf_checkpoint):
        yield from check_against_hf(config.hf_checkpoint, config)


def _data_files(config: Config) -> Iterator[str]:
    reads_prompts = (
        config.data_source_path == DEFAULT_DATA_SOURCE
        and not config.disable_rollout_global_dataset
        and config.load_debug_rollout_data is None
    )
    if reads_prompts and config.prompt_data is None:
        yield (
            "--prompt-data is missing; a rollout function that brings its own prompts wants "
            "--disable-rollout-global-dataset"
        )
    if reads_prompts and config.prompt_data is not None:
        yield from _missing_file("--prompt-data", config.prompt_data)
    for dataset in config.eval_datasets:
        yield from _missing_file(f"evaluation dataset {dataset.name}", dataset.path)


def _missing_file(where: str, path: str) -> Iterator[str]:
    file = re.sub(r"@\[[^\]]*\]$", "", path)
    if not Path(file).exists():
        yield f"{where}: there is no file {file}"


def _warn_without_effect(config: Config) -> None:
    """Say which flags do nothing in this run: no error, as scripts share blocks of flags."""
    defaults = {option.dest: option.default for option in slime_options()}
    for name, needed in _NEEDS.items():
        is_given = getattr(config, name) not in (defaults[name], None)
        if is_given and getattr(config, needed) in (False, None):
            logger.warning("%s has no effect without %s", _flag(name), _flag(needed))
    for name, (needed, value) in _NEEDS_VALUE.items():
        if getattr(config, name) != defaults[name] and getattr(config, needed) != value:
            logger.warning("%s has no effect without %s %s", _flag(name), _flag(needed), value)
    if config.custom_tis_function_path and not (config.use_tis or config.get_mismatch_metrics):
        logger.warning("--custom-tis-function-path has no effect without --use-tis")
    if config.use_dynamic_batch_size and config.micro_batch_size != 1:
        logger.warning("--micro-batch-size has no effect with --use-dynamic-batch-size")


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    _length_of_run,
    _batch_sizes,
    _ranks_share_batch,
    parallel_sizes,
    _algorithm,
    _rollout,
    _engines,
    _engine_slots,
    _engine_options,
    engine_sizes,
    external_engines,
    pausing,
    fully_async,
    routing,
    _rewards,
    _agents,
    _environments,
    _sandbox,
    _periods,
    _device,
    _precision,
    _optimizer,
    schedule,
    weights_through_files,
    _folders,
    _model,
    quantized_weights,
    _data_files,
)
