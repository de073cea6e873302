import logging
from pathlib import Path

import pytest
from support.config_argv import base_argv

from slime.cli.parse import load_config
from slime.errors import ConfigError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rollout_batch_size": None}, "--rollout-batch-size is missing"),
        ({"num_rollout": None}, "--num-rollout or --num-epoch is missing"),
        (
            {"num_rollout": None, "num_epoch": "1", "disable_rollout_global_dataset": ""},
            "--num-epoch needs a dataset",
        ),
        ({"global_batch_size": "12"}, r"12 does not divide .* = 32; try 8 or 16"),
        ({"num_steps_per_rollout": "5"}, r"5 does not divide .* = 32; try 4 or 8"),
        (
            {"num_steps_per_rollout": "4", "global_batch_size": "16"},
            "contradict each other: 32 samples in 4 steps are 8 a step",
        ),
        (
            {"global_batch_size": "1"},
            "--global-batch-size 1 is less than the 2 data-parallel ranks",
        ),
        ({"micro_batch_size": "3"}, r"2 x 3 = 6; try 30, or --use-dynamic-batch-size"),
        ({"over_sampling_batch_size": "2"}, "2 is less than --rollout-batch-size 4"),
        ({"use_dynamic_batch_size": ""}, "needs --max-tokens-per-gpu"),
        ({"lr": "-1"}, "--lr must be at least 0, found -1"),
        ({"lr": "nan"}, "--lr must be a finite number"),
        ({"rollout_temperature": "0"}, "--rollout-temperature must be above 0"),
        ({"rollout_batch_size": "0"}, "--rollout-batch-size must be at least 1, found 0"),
        ({"kl_coef": "0.1", "kl_loss_coef": "0.1"}, "either into the reward or into the loss"),
        ({"kl_loss_coef": "0.1"}, "does nothing without --use-kl-loss"),
        ({"use_rollout_logprobs": "", "use_tis": ""}, "exclude each other"),
        ({"get_mismatch_metrics": ""}, "needs --custom-tis-function-path"),
        (
            {
                "get_mismatch_metrics": "",
                "custom_tis_function_path": ("slime.backends.megatron_utils.loss.icepop_function"),
            },
            "works with --use-tis only",
        ),
        (
            {"custom_generate_function_path": "slime.agent.generate.generate"},
            "needs --agent-function-path",
        ),
        (
            {"agent_function_path": "a.b", "custom_generate_function_path": "my.generate"},
            "my.generate; give one of them",
        ),
        (
            {"custom_generate_function_path": "slime.environments.generate.generate"},
            "needs --environment-path",
        ),
        (
            {"environment_path": "a.B", "agent_function_path": "a.b"},
            "what generates is slime.agent.generate.generate",
        ),
        (
            {"environment_path": "a.B", "apply_chat_template": ""},
            "--apply-chat-template has closed it before",
        ),
        ({"environment_path": "a.B", "environment_timeout_s": "0"}, "must be above 0"),
        ({"agent_host": "0.0.0.0"}, "no address that an agent can go to"),
        ({"agent_port": "70000"}, "no port; give one up to 65535"),
        ({"agent_sampling": "mine"}, "--agent-sampling"),
        ({"eps_clip_c": "0.5"}, "--eps-clip-c must be above 1"),
        (
            {"rollout_engine": "sglang", "update_weight_pause_mode": "retract"},
            "add --sglang-disable-radix-cache",
        ),
        (
            {"rollout_engine": "sglang", "update_weight_pause_mode": "in_place"},
            "--update-weight-pause-mode in_place: SGLang would keep in its prefix cache",
        ),
        (
            {
                "rollout_engine": "sglang",
                "update_weight_pause_mode": "retract",
                "sglang_disable_radix_cache": "",
                "colocate": "",
            },
            "--update-weight-pause-mode retract: SGLang that leaves the trainer's devices",
        ),
        (
            {
                "rollout_engine": "sglang",
                "update_weight_pause_mode": "in_place",
                "colocate": "",
                "no_offload_rollout": "",
            },
            "add --sglang-disable-radix-cache",
        ),
        (
            {"router_policy": "power_of_two"},
            "by default a request goes to the engine with the fewest",
        ),
        ({"use_tis": "", "tis_clip": "0.5", "tis_clip_low": "1"}, "is above --tis-clip"),
        (
            {"loss_type": "custom_loss"},
            "custom_loss and --custom-loss-function-path need each other",
        ),
        ({"custom_loss_function_path": "a.b"}, "need each other"),
        (
            {"custom_pg_loss_reducer_function_path": "a.b", "loss_type": "sft_loss"},
            "--custom-pg-loss-reducer-function-path does nothing with --loss-type sft_loss",
        ),
        (
            {"use_routing_replay": "", "use_rollout_logprobs": ""},
            "experts of the log-prob pass, which these flags leave out",
        ),
        ({"eval_top_p": "0"}, "--eval-top-p must be above 0 and at most 1"),
        ({"rollout_top_k": "0"}, "--rollout-top-k must be at least 1, or -1"),
        ({"sglang_router_ip": "127.0.0.1"}, "needs --sglang-router-port"),
        ({"debug_rollout_only": "", "debug_train_only": ""}, "exclude each other"),
        ({"rollout_num_gpus": None}, "--rollout-num-gpus is missing"),
        (
            {"rollout_num_gpus": "3", "rollout_num_gpus_per_engine": "2"},
            "3 is no multiple of --rollout-num-gpus-per-engine 2",
        ),
        ({"sglang_pp_size": "2"}, "--sglang-pp-size 2 does not divide"),
        ({"sglang_dp_size": "2"}, "needs --sglang-enable-dp-attention"),
        (
            {"device": "cpu", "sglang_dp_size": "1"},
            "the embedded CPU engine has no --sglang-dp-size",
        ),
        ({"group_rm": ""}, "--group-rm needs --custom-rm-path"),
        ({"rm_type": "exact_mach"}, "did you mean 'exact_match'"),
        ({"rm_type": "remote_rm"}, "needs --rm-url"),
        ({"save_interval": "5"}, "--save-interval 5 needs --save"),
        ({"eval_interval": "5"}, "--eval-interval 5 needs data"),
        ({"bf16": "", "fp16": ""}, "fp16"),
        (
            {
                "device": "cuda",
                "rollout_num_gpus": "12",
                "rollout_num_gpus_per_engine": "12",
            },
            "12 is neither within a node of --num-gpus-per-node 8 slots nor",
        ),
        (
            {"device": "cuda", "rollout_num_gpus_per_engine": "2", "sglang_pp_size": "2"},
            "--sglang-pp-size above 1",
        ),
        (
            {"use_precision_aware_optimizer": ""},
            "--use-precision-aware-optimizer without --optimizer-cpu-offload",
        ),
        (
            {"optimizer_cpu_offload": "", "optimizer_offload_fraction": "1.5"},
            "--optimizer-offload-fraction 1.5 is no share",
        ),
        ({"lr_warmup_iters": "1000"}, "the warm-up takes 1000 of .* optimizer steps"),
        ({"lr_warmup_fraction": "1"}, "lower --lr-warmup-iters"),
        ({"lr_warmup_iters": "5", "lr_decay_iters": "5"}, "the warm-up takes 5 of 5"),
        ({"hf_checkpoint": None}, "--hf-checkpoint is missing"),
        ({"hf_checkpoint": "/nowhere"}, r"there is no config\.json"),
        ({"ref_load": "/nowhere"}, "--ref-load /nowhere: neither"),
        ({"prompt_data": None}, "--prompt-data is missing"),
        ({"prompt_data": "/nowhere.jsonl@[0:5]"}, r"there is no file /nowhere\.jsonl$"),
        ({"eval_prompt_data": "/nowhere"}, "evaluation dataset aime: there is no file"),
    ],
)
def test_broken_rules_say_what_to_change(
    tmp_path: Path, flags: dict[str, str | None], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(base_argv(tmp_path, **flags))


@pytest.mark.parametrize(
    "flags",
    [
        {"use_kl_loss": "", "kl_loss_coef": "0.0", "kl_loss_type": "low_var_kl"},
        {"use_dynamic_batch_size": "", "max_tokens_per_gpu": "100", "global_batch_size": "2"},
        {"rm_type": "boxed_math"},
        {"rm_type": None},
        {"prompt_data": None, "disable_rollout_global_dataset": ""},
        {"debug_rollout_only": "", "num_layers": None, "global_batch_size": "1"},
        {"rollout_num_gpus": "0"},
        {"sglang_pp_size": "2", "rollout_num_gpus_per_engine": "2"},
        {"loss_type": "sft_loss", "debug_train_only": "", "rollout_num_gpus": None},
        {"num_rollout": "0"},
        {"lr_warmup_iters": "5", "num_rollout": "0"},
        {"lr_warmup_iters": "1000", "lr_decay_iters": "1001"},
        {"lr_warmup_iters": "1000", "debug_rollout_only": "", "num_layers": None},
    ],
)
def test_good_combinations_pass(tmp_path: Path, flags: dict[str, str | None]) -> None:
    load_config(base_argv(tmp_path, **flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_tokens_per_gpu": "9"}, "--max-tokens-per-gpu has no effect without"),
        ({"tis_clip": "3"}, "--tis-clip has no effect without --use-tis"),
        (
            {"use_dynamic_batch_size": "", "max_tokens_per_gpu": "9", "micro_batch_size": "2"},
            "--micro-batch-size has no effect with",
        ),
        ({"rollout_top_k": "5"}, "log-probs are over the whole vocabulary"),
    ],
)
def test_flags_without_effect_are_named(
    tmp_path: Path,
    flags: dict[str, str | None],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        load_config(base_argv(tmp_path, **flags))
    assert message in caplog.text


_EXPERTS = {"num_experts": "4", "moe_layer_freq": "1", "actor_num_gpus_per_node": "4"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"tensor_model_parallel_size": "2", "pipeline_model_parallel_size": "2"},
            "tensor x pipeline x context parallel size = 4 does not divide .* = 2",
        ),
        (
            {"tensor_model_parallel_size": "2", "num_attention_heads": "3"},
            "2 does not divide --num-attention-heads 3: each rank has whole heads",
        ),
        (
            {
                "tensor_model_parallel_size": "2",
                "group_query_attention": "",
                "num_query_groups": "3",
            },
            "2 does not divide --num-query-groups 3",
        ),
        (
            {"tensor_model_parallel_size": "2", **_EXPERTS},
            r"experts \(--num-experts\) with --tensor-model-parallel-size 2 needs --sequence-par",
        ),
        (
            {"tensor_model_parallel_size": "2", "multi_latent_attention": ""},
            "--multi-latent-attention with --tensor-model-parallel-size 2 needs --sequence-par",
        ),
        (
            {"num_virtual_stages_per_pipeline_rank": "2"},
            "--num-virtual-stages-per-pipeline-rank 2 needs --pipeline-model-parallel-size above 1",
        ),
        (
            {"decoder_last_pipeline_num_layers": "1"},
            "--decoder-last-pipeline-num-layers 1 needs --pipeline-model-parallel-size above 1",
        ),
        (
            {
                "pipeline_model_parallel_size": "2",
                "num_virtual_stages_per_pipeline_rank": "2",
                "num_layers_per_virtual_pipeline_stage": "1",
            },
            "say the same thing; give one of them",
        ),
        (
            {"pipeline_model_parallel_size": "2", "num_layers": "5"},
            "2 does not divide --num-layers 5 into 2 equal stages; give --decoder-first",
        ),
        (
            {
                "pipeline_model_parallel_size": "4",
                "num_layers": "6",
                "decoder_first_pipeline_num_layers": "2",
                "actor_num_gpus_per_node": "4",
            },
            "does not divide --num-layers 6 less 2 of the first stage into 3 equal stages",
        ),
        (
            {
                "pipeline_model_parallel_size": "2",
                "num_layers": "6",
                "num_virtual_stages_per_pipeline_rank": "2",
            },
            "--num-virtual-stages-per-pipeline-rank 2 does not divide the 3 layers of a pipeline",
        ),
        (
            {
                "pipeline_model_parallel_size": "2",
                "num_layers": "5",
                "decoder_last_pipeline_num_layers": "1",
                "num_layers_per_virtual_pipeline_stage": "2",
            },
            "--num-layers-per-virtual-pipeline-stage 2 does not divide the 1 layers of a pipeline",
        ),
        (
            {"expert_model_parallel_size": "2"},
            "--expert-model-parallel-size 2: the model has no experts",
        ),
        (
            {"expert_model_parallel_size": "3", **_EXPERTS},
            "--expert-model-parallel-size 3 does not divide --num-experts 4",
        ),
        (
            {"expert_tensor_parallel_size": "2", **_EXPERTS},
            "--expert-tensor-parallel-size 2 is greater than --tensor-model-parallel-size 1",
        ),
        (
            {
                "expert_model_parallel_size": "4",
                "tensor_model_parallel_size": "2",
                "sequence_parallel": "",
                **_EXPERTS,
            },
            "expert tensor x expert x pipeline parallel size = 2 x 4 x 1 = 8 does not divide .* 4",
        ),
        (
            {
                "pipeline_model_parallel_size": "2",
                "num_virtual_stages_per_pipeline_rank": "2",
                "num_layers": "4",
                "global_batch_size": "1",
            },
            r"1 is less than the 2 data-parallel ranks x pipeline stages \(interleaved\)",
        ),
    ],
)
def test_parallel_sizes_that_cannot_work_are_named(
    tmp_path: Path, flags: dict[str, str | None], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(base_argv(tmp_path, **flags))


@pytest.mark.parametrize(
    "flags",
    [
        {"tensor_model_parallel_size": "2", "sequence_parallel": ""},
        {"tensor_model_parallel_size": "2", "num_attention_heads": "4"},
        {"pipeline_model_parallel_size": "2"},
        {"context_parallel_size": "2"},
        {"expert_model_parallel_size": "2", **_EXPERTS},
        {
            "tensor_model_parallel_size": "2",
            "sequence_parallel": "",
            "expert_model_parallel_size": "4",
            "expert_tensor_parallel_size": "1",
            **_EXPERTS,
        },
    ],
)
def test_parallel_sizes_that_work_pass(tmp_path: Path, flags: dict[str, str | None]) -> None:
    load_config(base_argv(tmp_path, **flags))


def test_sequences_are_not_cut_among_one_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_config(base_argv(tmp_path, sequence_parallel=""))
    assert "--sequence-parallel has no effect with --tensor-model-parallel-size 1" in caplog.text


@pytest.mark.parametrize(
    "flags",
    [
        {"update_weight_pause_mode": "in_place"},
        {"rollout_engine": "sglang", "update_weight_pause_mode": "abort"},
        {
            "rollout_engine": "sglang",
            "update_weight_pause_mode": "in_place",
            "sglang_disable_radix_cache": "",
        },
        {
            "rollout_engine": "sglang",
            "update_weight_pause_mode": "in_place",
            "sglang_disable_radix_cache": "",
            "colocate": "",
            "no_offload_train": "",
            "no_offload_rollout": "",
        },
        {"update_weights_in_flight": ""},
    ],
)
def test_pauses_that_are_exact_are_allowed(tmp_path: Path, flags: dict[str, str]) -> None:
    load_config(base_argv(tmp_path, **flags))
