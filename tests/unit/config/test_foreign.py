from slime.config.foreign import (
    engine_options,
    megatron_index,
    megatron_values,
    prefixed_values,
    typed_megatron_argv,
    untyped_megatron_argv,
)
from slime.config.index import command_line_index
from slime.config.megatron import MegatronConfig
from slime.config.words import read_words


def test_typed_words_leave_out_what_megatron_takes_anyway() -> None:
    words = typed_megatron_argv(MegatronConfig(lr=1e-6, seed=1234, global_batch_size=8))
    assert words[: words.index("--lr") + 2] == (
        "--global-batch-size",
        "8",
        "--micro-batch-size",
        "1",
        "--lr",
        "1e-06",
    )
    assert "--seed" not in words


def test_typed_words_name_switches_without_a_value() -> None:
    words = typed_megatron_argv(MegatronConfig(finetune=True, bf16=False))
    assert "--finetune" in words
    assert "--bf16" not in words


def test_typed_words_are_known_to_megatron() -> None:
    everything = MegatronConfig(
        seed=1, load="a", save="b", bf16=True, calculate_per_token_loss=True, mtp_num_layers=1
    )
    given = read_words(typed_megatron_argv(everything), megatron_index())
    assert {item.option.owner for item in given} == {"megatron"}


def test_untyped_words_drop_the_flags_slime_types() -> None:
    argv = ("--lr", "0.1", "--num-attention-heads", "4", "--finetune", "--swiglu")
    assert untyped_megatron_argv(argv) == ("--num-attention-heads", "4", "--swiglu")


def test_megatron_values_have_defaults() -> None:
    values = megatron_values(["--disable-bias-linear"])
    assert values["add_bias_linear"] is False
    assert values["num_query_groups"] == 1
    assert values["transformer_impl"] == "transformer_engine"


def test_engine_options_are_named_as_on_the_command_line() -> None:
    argv = [
        "--sglang-mem-fraction-static",
        "0.7",
        "--sglang-cuda-graph-bs-decode",
        "1",
        "2",
        "--sglang-disable-radix-cache",
        "--sglang-no-dllm-fdfo",
    ]
    options = engine_options("sglang", read_words(argv, command_line_index()))
    assert options == {
        "mem_fraction_static": 0.7,
        "cuda_graph_bs_decode": [1, 2],
        "disable_radix_cache": True,
        "no_dllm_fdfo": True,
    }


def test_an_alias_is_stored_under_the_first_name() -> None:
    given = read_words(["--sglang-data-parallel-size", "2"], command_line_index())
    assert engine_options("sglang", given) == {"dp_size": 2}


def test_repeatable_router_options_collect() -> None:
    argv = ["--router-request-id-headers", "a", "b", "--router-request-id-headers", "c"]
    given = read_words(argv, command_line_index())
    assert engine_options("router", given) == {"request_id_headers": ["a", "b", "c"]}


def test_prefixed_values_have_defaults() -> None:
    values = prefixed_values("router", {"policy": "random"})
    assert values["router_policy"] == "random"
    assert values["router_request_timeout_secs"] > 0
