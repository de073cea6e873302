"""Requests of the engine protocol are read strictly."""

import subprocess
import sys
from typing import Any

import pytest

from slime.engines.control_requests import (
    AbortRequest,
    DistributedUpdate,
    TensorUpdate,
    WeightsGroup,
    memory_tags,
    pause_mode,
)
from slime.engines.protocol import (
    DEFAULT_MAX_NEW_TOKENS,
    NO_LIMIT,
    GenerateCall,
    MemoryTag,
    PauseMode,
    SamplingParams,
)
from slime.errors import EngineProtocolError


def call(**body: Any) -> GenerateCall:
    return GenerateCall.from_json({"input_ids": [1, 2], **body})


def params(**values: Any) -> SamplingParams:
    return SamplingParams.from_json(values)


def test_protocol_needs_no_torch() -> None:
    code = "import slime.engines.control_requests, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_sglangs() -> None:
    made = params()
    assert made.max_new_tokens == DEFAULT_MAX_NEW_TOKENS == 128
    assert (made.temperature, made.top_p, made.top_k, made.min_p) == (1.0, 1.0, NO_LIMIT, 0.0)
    assert made.skip_special_tokens
    assert made.spaces_between_special_tokens
    assert not made.no_stop_trim
    assert not made.ignore_eos


def test_null_means_default_but_max_new_tokens_null_means_until_the_context_is_full() -> None:
    made = params(temperature=None, top_k=None, stop=None, n=None, max_new_tokens=None)
    assert made == SamplingParams(max_new_tokens=None)


def test_temperature_zero_becomes_greedy_with_unscaled_log_probs() -> None:
    made = params(temperature=0.0)
    assert (made.temperature, made.top_k) == (1.0, 1)


def test_one_stop_string_and_a_list_of_them_are_the_same() -> None:
    assert params(stop="a").stop == params(stop=["a"]).stop == ("a",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, r"top_p must be a number in \(0.0, 1.0\]"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "use -1"),
        ({"top_k": "5"}, "whole number"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n must be"),
        ({"n": True}, "n must be"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens"),
        ({"stop": [1]}, "stop must be a string"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"custom_params": 3}, "custom_params"),
        ({"max_new_token": 3}, "did you mean 'max_new_tokens'"),
        ({"regex": "a+"}, "cannot do this"),
        ({"json_schema": "{}"}, "cannot do this"),
    ],
)
def test_wrong_sampling_parameters_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineProtocolError, match=message):
        params(**values)


def test_unknown_top_level_fields_pass_because_routers_add_some() -> None:
    made = call(model="unknown", return_text_in_logprobs=False, log_metrics=True, lora_path=None)
    assert made.prompts[0].input_ids == (1, 2)


@pytest.mark.parametrize("name", ["image_data", "return_routed_experts", "top_logprobs_num"])
def test_fields_that_would_change_the_answer_are_refused(name: str) -> None:
    with pytest.raises(EngineProtocolError, match=name):
        call(**{name: 1})


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"input_ids": []},
        {"input_ids": [[1], []]},
        {"input_ids": [1.5]},
        {"input_ids": [True]},
        {"input_ids": [-1]},
        {"input_ids": "12"},
        {"text": []},
        {"text": "a", "input_ids": [1]},
    ],
)
def test_prompts_that_are_none_are_refused(body: Any) -> None:
    with pytest.raises(EngineProtocolError):
        GenerateCall.from_json(body)


def test_one_prompt_is_answered_alone_and_several_answers_as_a_list() -> None:
    assert not call().as_list
    assert call(sampling_params={"n": 2}).as_list
    assert GenerateCall.from_json({"input_ids": [[1]]}).as_list


def test_a_batch_has_parameters_and_ids_for_each_prompt() -> None:
    made = GenerateCall.from_json(
        {
            "input_ids": [[1], [2]],
            "sampling_params": [{"temperature": 0.5}, {"n": 2}],
            "rid": "r",
            "sampling_seeds": [[7], [8, 9]],
        }
    )
    assert [p.params.temperature for p in made.prompts] == [0.5, 1.0]
    assert [p.rid for p in made.prompts] == ["r_0", "r_1"]
    assert [p.seeds for p in made.prompts] == [(7,), (8, 9)]


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3], "12", [1, "2"], 5])
def test_one_seed_per_answer_is_demanded(seeds: Any) -> None:
    with pytest.raises(EngineProtocolError, match="sampling_seeds"):
        call(sampling_params={"n": 2}, sampling_seeds=seeds)


def test_abort_by_id_reaches_the_children_of_a_group() -> None:
    wanted = AbortRequest.from_json({"rid": "a"})
    assert wanted.matches("a_3")
    assert not wanted.matches("b")
    with pytest.raises(EngineProtocolError, match="abort_all"):
        AbortRequest.from_json({})


def test_pause_mode_is_abort_unless_named() -> None:
    assert pause_mode({}) is PauseMode.ABORT
    assert pause_mode({"mode": "in_place"}) is PauseMode.IN_PLACE
    with pytest.raises(EngineProtocolError, match="in_place"):
        pause_mode({"mode": "stop"})


def test_no_memory_tag_means_all() -> None:
    assert memory_tags({}) == frozenset(MemoryTag)
    assert memory_tags({"tags": ["weights"]}) == {MemoryTag.WEIGHTS}
    with pytest.raises(EngineProtocolError, match="kv_cache"):
        memory_tags({"tags": ["kv"]})


def test_a_group_member_needs_a_rank_below_the_size_and_gloo() -> None:
    body = {"master_address": "h", "master_port": 1, "rank_offset": 1, "world_size": 2}
    assert WeightsGroup.from_json(body).rank == 1
    with pytest.raises(EngineProtocolError, match="rank_offset"):
        WeightsGroup.from_json(body | {"rank_offset": 2})
    with pytest.raises(EngineProtocolError, match="gloo"):
        WeightsGroup.from_json(body | {"backend": "nccl"})


def test_distributed_update_lists_have_one_length() -> None:
    body = {"names": ["a"], "dtypes": ["torch.float32"], "shapes": [[2, 3]]}
    update = DistributedUpdate.from_json(body)
    assert (update.dtypes, update.shapes) == (("float32",), ((2, 3),))
    with pytest.raises(EngineProtocolError, match="one length"):
        DistributedUpdate.from_json(body | {"names": ["a", "b"]})
    with pytest.raises(EngineProtocolError, match="shape"):
        DistributedUpdate.from_json(body | {"shapes": [[-1]]})


def test_pickled_tensors_are_refused() -> None:
    with pytest.raises(EngineProtocolError, match="unpickle"):
        TensorUpdate.from_json(
            {"serialized_named_tensors": ["AAAA"], "load_format": "flattened_bucket"}
        )
    with pytest.raises(EngineProtocolError, match="base64"):
        TensorUpdate.from_json({"serialized_named_tensors": ["\u00e4"]})
