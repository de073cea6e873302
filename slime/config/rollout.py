"""RolloutConfig: how samples are generated, by which function and which engines."""

from dataclasses import dataclass
from typing import Literal

from slime.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Rollout."""

    hf_checkpoint: str | None = flag(
        None, "Hugging Face folder: tokenizer, model config, the engines' initial weights."
    )
    model_name: str | None = flag(
        None, "Architecture for the weight mapping; by default model_type of --hf-checkpoint."
    )
    rollout_engine: Literal["auto", "sglang", "embedded"] = flag(
        "auto", "Engine; auto takes SGLang on CUDA and the embedded engine on CPU."
    )
    rollout_timeout_s: float = flag(
        7200.0, "Deadline of one round of generation, in seconds.", above=0
    )
    request_timeout_s: float = flag(
        1800.0, "Deadline of one request to an engine, in seconds.", above=0
    )
    generate_timeout_s: float | None = flag(
        None,
        "Deadline of one call of --custom-generate-function-path, in seconds; a sample that takes "
        "longer fails alone. By default only --rollout-timeout-s bounds it.",
        above=0,
    )
    rollout_function_path: str = flag(
        "slime.rollout.sglang_rollout.generate_rollout",
        "Function that runs one round: fn(args, rollout_id, data_source, evaluation=False).",
    )
    rollout_temperature: float = flag(
        1.0, "Sampling temperature, above 0; the trainer divides its logits by it too.", above=0
    )
    rollout_top_p: float = flag(1.0, "Nucleus sampling.")
    rollout_top_k: int = flag(-1, "Sample among the k likeliest tokens; -1 takes all.")
    rollout_max_context_len: int | None = flag(
        None, "Most tokens of prompt and response together.", at_least=1
    )
    rollout_max_prompt_len: int | None = flag(
        None,
        "Longer prompts are dropped at load; by default --rollout-max-context-len minus 1.",
        at_least=1,
    )
    rollout_max_response_len: int | None = flag(None, "Most tokens of a response.", at_least=1)
    rollout_skip_special_tokens: bool = flag(
        False, "Leave special tokens out of the response text."
    )
    rollout_stop: tuple[str, ...] | None = flag(None, "Strings that end a response.")
    rollout_stop_token_ids: tuple[int, ...] | None = flag(None, "Token ids that end a response.")
    rollout_shuffle: bool = flag(False, "Shuffle the prompts anew in each epoch.")
    rollout_seed: int = flag(42, "Seed of the shuffle and of deterministic sampling.")
    over_sampling_batch_size: int | None = flag(
        None, "Prompt groups per submission; by default --rollout-batch-size.", at_least=1
    )
    dynamic_sampling_filter_path: str | None = flag(
        None, "Function that keeps or drops a finished group: fn(args, samples)."
    )
    partial_rollout: bool = flag(
        False, "Keep the unfinished samples of a round and resume them in a later one."
    )
    fully_async: bool = flag(
        False,
        "train_async.py: generate all the time. A round is trained as soon as enough groups are whole, "
        "the others go on through it, and weights change under them (--update-weights-in-flight).",
    )
    max_weight_staleness: int = flag(
        2,
        "--fully-async: most rounds trained between the weights that wrote a sample's first token and "
        "the update that trains it; groups are begun, and waited for, so that it holds.",
        at_least=0,
    )
    regenerate_on_resume: bool = flag(
        False,
        "Generate rounds after the checkpoint again, though the run folder has them recorded.",
    )
    mask_offpolicy_in_partial_rollout: bool = flag(
        False, "Do not train on the tokens an older policy wrote before a resume."
    )
    custom_generate_function_path: str | None = flag(
        None, "Function that generates one sample: async fn(args, sample, sampling_params)."
    )
    rollout_sample_hook_path: tuple[str, ...] = flag(
        (),
        "Function called with each finished sample, before its reward; may be repeated.",
        action="append",
    )
    custom_rollout_log_function_path: str | None = flag(
        None,
        "Function that logs a round: fn(rollout_id, args, samples, extra_metrics, rollout_time).",
    )
    custom_eval_rollout_log_function_path: str | None = flag(
        None, "Function that logs an evaluation: fn(rollout_id, args, data, extra_metrics)."
    )
    buffer_filter_path: str | None = flag(
        None, "Function that takes groups out of the buffer: fn(args, rollout_id, buffer, n)."
    )
    keep_old_actor: bool = flag(
        False, "Keep a copy of the policy that generated, for old log-probs."
    )
    rollout_data_postprocess_path: str | None = flag(
        None, "Function called on each train rank before training: fn(args, rollout_id, data)."
    )
    rollout_data_transport: Literal["object-store", "nixl"] = flag(
        "object-store", "How rollout data travels to the train actors."
    )
    rollout_external_engine_addrs: tuple[str, ...] | None = flag(
        None,
        "host:port of engines that somebody else runs: adopted, given weights, watched, and neither "
        "started nor ended. SGLang wants --custom-weight-loader slime.engines.sglang.receiver.receive.",
    )
    use_fault_tolerance: bool = flag(
        False,
        "Check the health of engines and router while they generate, and restart those that hang; "
        "those that die are restarted in any case.",
    )
    rollout_health_check_interval: float = flag(
        30.0, "Seconds from one health check of an engine to its next.", above=0
    )
    rollout_health_check_timeout: float = flag(
        30.0, "Deadline of a health check, in seconds.", above=0
    )
    rollout_health_check_first_wait: float = flag(
        0.0, "Seconds of a round before its first health check.", at_least=0
    )
    rollout_buffer_url: str | None = flag(None, "Address of an HTTP rollout buffer.")
    fetch_trajectory_retry_times: int = flag(-1, "Retries of the HTTP rollout buffer; -1: endless.")
    min_batch_collection_ratio: float = flag(1.0, "Part of a batch the HTTP buffer waits for.")
    rollout_task_type: str = flag("math", "Task type told to the HTTP rollout buffer.")
    sglang_router_ip: str | None = flag(
        None, "Address of a running router; none is started when set."
    )
    sglang_router_port: int | None = flag(
        None, "Port of the router; a free one is taken when unset."
    )
    sglang_router_request_timeout_secs: int = flag(
        14400, "Deadline of one request inside the router, in seconds.", above=0
    )
    sglang_server_concurrency: int = flag(512, "Requests in flight per engine.", at_least=1)
    prefill_num_servers: int | None = flag(
        None, "Engines that only prefill; the others only decode."
    )
    sglang_config: str | None = flag(None, "YAML of several models and groups of servers.")
