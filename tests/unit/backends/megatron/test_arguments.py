from dataclasses import replace

import pytest
import torch
from support.megatron_runs import make_tiny_qwen3, trainer_config

from slime.backends.megatron.process.arguments import parse_megatron_args
from slime.config.config import Config
from slime.errors import ConfigError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return trainer_config(make_tiny_qwen3(tmp_path_factory.mktemp("model"), vocab_size=32))


def parsed(config: Config, device: str = "cpu") -> dict[str, object]:
    return vars(parse_megatron_args(config, device=torch.device(device), rank=0, world_size=1))


def test_values_the_trainer_depends_on_are_set_whatever_the_words_say(config: Config) -> None:
    args = parsed(config)
    assert args["use_distributed_optimizer"]
    assert args["variable_seq_lengths"]
    assert args["calculate_per_token_loss"]
    assert args["moe_token_dispatcher_type"] == "alltoall"
    assert args["gradient_accumulation_fusion"]


def test_dropout_is_off_unless_asked_for(config: Config) -> None:
    assert parsed(config)["hidden_dropout"] == 0.0
    words = (*config.megatron_argv, "--hidden-dropout", "0.1")
    assert parsed(replace(config, megatron_argv=words))["hidden_dropout"] == 0.1


def test_precision_is_fp32_on_cpu_and_bf16_on_cuda_unless_fp16(config: Config) -> None:
    assert parsed(config)["params_dtype"] == torch.float32
    assert parsed(config, "cuda")["params_dtype"] == torch.bfloat16
    assert parsed(replace(config, fp16=True), "cuda")["params_dtype"] == torch.float16


def test_schedule_spans_the_steps_of_the_whole_run(config: Config) -> None:
    changed = replace(
        config, num_rollout=10, rollout_batch_size=6, n_samples_per_prompt=4, global_batch_size=8
    )
    assert parsed(changed)["train_iters"] == 30


def test_unknown_word_is_an_error_of_the_configuration(config: Config) -> None:
    words = (*config.megatron_argv, "--no-such-flag")
    with pytest.raises(ConfigError, match="no-such-flag"):
        parsed(replace(config, megatron_argv=words))


def test_refusal_of_megatron_keeps_its_reason(config: Config) -> None:
    words = (
        *config.megatron_argv,
        "--recompute-granularity",
        "selective",
        "--recompute-method",
        "uniform",
    )
    with pytest.raises(ConfigError, match="selective"):
        parsed(replace(config, megatron_argv=words))
