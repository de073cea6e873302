"""What functions of users may import: module -> name -> the arguments they may pass.

Frozen: names may be added. One that goes, or takes other arguments, breaks projects of users; say so in
CHANGELOG.md and docs/compatibility.md. None: a value, or a class that is not to be called.
"""

PUBLIC: dict[str, dict[str, str | None]] = {
    "slime.agent": {
        "agent_session": "args, sample, sampling_params, *, evaluation=False",
        "Session": None,
        "Session.samples": "self",
        "Session.last_sample": "self",
    },
    "slime.environments": {
        "Environment": None,
        "Step": None,
    },
    "slime.utils.arguments": {"parse_args": "add_custom_arguments=None"},
    "slime.utils.async_utils": {"run": "coroutine"},
    "slime.utils.data": {"read_rows": "path"},
    "slime.utils.http_utils": {
        "get": "url",
        "post": "url, payload, max_retries=60, headers=None",
    },
    "slime.utils.mask_utils": {
        "MultiTurnLossMaskGenerator": "tokenizer, tokenizer_type='qwen'",
        "MultiTurnLossMaskGenerator.get_loss_mask": "self, messages, tools=None",
        "MultiTurnLossMaskGenerator.get_response_lengths": "self, loss_masks",
        "MultiTurnLossMaskGenerator.get_text_from_loss_mask": "self, token_ids, loss_mask",
    },
    "slime.utils.misc": {"load_function": "path"},
    "slime.utils.processing_utils": {"load_tokenizer": "path"},
    "slime.utils.types": {
        "Sample": None,
        "Sample.Status": None,
        "Sample.append_response_tokens": (
            "self, args, *, tokens, log_probs=None, trainable=True, meta_info=None, text=None, "
            "update_terminal_info=True"
        ),
        "Sample.get_reward_value": "self, args",
        "Sample.effective_response_length": None,
        "Sample.to_dict": "self",
        "Sample.from_dict": "data",
        "SpecInfo": None,
        "PrefixCacheInfo": None,
    },
    "slime.rollout.base_types": {
        "RolloutFnTrainOutput": "samples, metrics=None",
        "RolloutFnEvalOutput": "data, metrics=None",
    },
    "slime.rollout.data_source": {
        "DataSource": None,
        "RolloutDataSource": "args",
        "RolloutDataSourceWithBuffer": "args",
        "RolloutDataSourceWithBuffer.get_samples": "self, num_samples",
        "RolloutDataSourceWithBuffer.add_samples": "self, samples",
        "RolloutDataSourceWithBuffer.save": "self, rollout_id",
        "RolloutDataSourceWithBuffer.load": "self, rollout_id=None",
        "RolloutDataSourceWithBuffer.get_buffer_length": "self",
        "pop_first": "args, rollout_id, buffer, num_samples",
    },
    "slime.rollout.filter_hub.base_types": {
        "DynamicFilterOutput": "keep, reason=None, keep_when_insufficient=False",
    },
    "slime.rollout.filter_hub.dynamic_sampling_filters": {
        "check_reward_nonzero_std": "args, samples",
        "check_reward_nonzero_std_with_fallback": "args, samples",
    },
    "slime.rollout.rm_hub": {"async_rm": "args, sample", "batched_async_rm": "args, samples"},
    "slime.rollout.rm_hub.math_dapo_utils": {
        "compute_score": "solution_str, ground_truth, strict_box_verify=False"
    },
    "slime.sandbox.shared": {"run_python": "args, code, *, stdin=''"},
    "slime.rollout.fully_async_rollout": {
        "generate_rollout_fully_async": "args, rollout_id, data_source, evaluation=False",
    },
    "slime.rollout.sft_rollout": {
        "generate_rollout": "args, rollout_id, data_source, evaluation=False",
    },
    "slime.rollout.sglang_rollout": {
        "GenerateState": "args",
        "GenerateState.tokenizer": None,
        "abort": "args, rollout_id",
        "eval_rollout": "args, rollout_id",
        "generate": "args, sample, sampling_params",
        "generate_and_rm": "args, sample, sampling_params, evaluation=False",
        "generate_and_rm_group": "args, group, sampling_params, evaluation=False",
        "generate_rollout": "args, rollout_id, data_source, evaluation=False",
        "generate_rollout_async": "args, rollout_id, data_source",
    },
    "slime.rollout.sglang_streaming_rollout": {
        "generate_streaming": "args, sample, sampling_params",
    },
    # New in this slime:
    "slime.rollout.turns": {
        "Turns": "args, sample, sampling_params, *, max_turns=None, evaluation=False",
        "Turns.ask": "self, **params",
        "Turns.call": "self, *calls, timeout_s=60.0, errors='raise'",
        "Turns.number": None,
        "Turns.room": None,
        "Turns.tell": "self, text",
        "Turns.tell_messages": "self, messages",
        "sibling_of": "sample, prompt",
    },
    "slime.rollout.tool_calls": {
        "BadToolCall": "text, reason",
        "ToolCall": "name, arguments",
        "parse_tool_calls": "text",
    },
}

# fmt: off
SAMPLE_FIELDS = [
    "group_index", "index", "rollout_id", "prompt",
    "tokens", "multimodal_inputs", "multimodal_train_inputs", "multimodal_train_input_id",
    "apply_chat_template_kwargs", "response", "response_length", "label",
    "reward", "loss_mask", "weight_versions", "rollout_log_probs",
    "rollout_top_p_token_ids", "rollout_top_p_token_offsets", "rollout_routed_experts", "remove_sample",
    "teacher_log_probs", "status", "metadata", "generate_function_path",
    "custom_rm_path", "train_metadata", "session_id", "non_generation_time",
    "spec_info", "prefix_cache_info",
]
# fmt: on

# The documented call behind each flag: what slime passes, by position and by keyword.
HOOK_CALLS: dict[str, str] = {
    "rollout_function_path": "args, rollout_id, data_source, *, evaluation",
    "eval_function_path": "args, rollout_id, data_source, *, evaluation",
    "custom_generate_function_path": "args, sample, sampling_params",
    "agent_function_path": "session, sample",
    "environment_path": "settings",
    "rollout_sample_hook_path": "args, sample, *, rollout_id, evaluation",
    "custom_rm_path": "args, sample",
    "dynamic_sampling_filter_path": "args, samples",
    "buffer_filter_path": "args, rollout_id, buffer, num_samples",
    "rollout_sample_filter_path": "args, data",
    "rollout_all_samples_process_path": "args, all_samples, data_source",
    "rollout_data_postprocess_path": "args, rollout_id, rollout_data",
    "data_source_path": "args",
    "custom_reward_post_process_path": "args, samples",
    "custom_convert_samples_to_train_data_path": "args, samples",
    "custom_loss_function_path": "args, batch, logits, sum_of_sample_mean",
    "custom_tis_function_path": (
        "*, args, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, "
        "response_lengths"
    ),
    "custom_pg_loss_reducer_function_path": (
        "total_lengths, response_lengths, loss_masks, calculate_per_token_loss"
    ),
    "custom_advantage_function_path": "args, rollout_data",
    "custom_model_provider_path": "pre_process, post_process",
    "custom_megatron_init_path": "args",
    "custom_megatron_before_log_prob_hook_path": "args, model, store_prefix",
    "custom_megatron_before_train_step_hook_path": (
        "args, rollout_id, step_id, model, optimizer, opt_param_scheduler"
    ),
    "custom_rollout_log_function_path": "rollout_id, args, samples, extra_metrics, rollout_time",
    "custom_eval_rollout_log_function_path": "rollout_id, args, data, extra_metrics",
    "custom_update_weight_post_write_path": "args, version_dir, rollout_engines",
}
