"""Whatever arrives over HTTP: a message, or an EngineProtocolError that names the field."""

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.engines.control_requests import DistributedUpdate, WeightsGroup
from slime.engines.generated import Limits, output_ids
from slime.engines.protocol import GenerateCall
from slime.errors import EngineProtocolError

BOUNDED = settings(max_examples=150, deadline=None)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
PARAMS = st.dictionaries(
    st.sampled_from(
        ["temperature", "top_p", "top_k", "max_new_tokens", "n", "stop", "sampling_seed", "min_p",
         "stop_token_ids", "ignore_eos", "frequency_penalty", "json_schema", "odd"]
    ),
    JSON,
)  # fmt: skip
GENERATE = st.dictionaries(
    st.sampled_from(
        ["text", "input_ids", "sampling_params", "return_logprob", "logprob_start_len", "rid",
         "stream", "sampling_seeds", "odd"]
    ),
    JSON | PARAMS | st.lists(st.integers(0, 9), max_size=3) | st.lists(PARAMS, max_size=2),
)  # fmt: skip
CONTROL = st.dictionaries(
    st.sampled_from(
        ["master_address", "master_port", "rank_offset", "world_size", "group_name", "backend",
         "timeout_s", "names", "dtypes", "shapes", "flush_cache", "load_format", "weight_version"]
    ),
    JSON | st.lists(st.text(max_size=3), max_size=2),
)  # fmt: skip


@BOUNDED
@given(body=GENERATE | JSON)
def test_any_body_of_generate(body: Any) -> None:
    try:
        call = GenerateCall.from_json(body)
    except EngineProtocolError:
        return
    for prompt in call.prompts:
        assert all(type(token) is int for token in prompt.input_ids or ())


@pytest.mark.parametrize("kind", [WeightsGroup, DistributedUpdate])
@BOUNDED
@given(body=CONTROL | JSON)
def test_any_body_of_a_control_call(kind: Any, body: Any) -> None:
    with contextlib.suppress(EngineProtocolError):
        kind.from_json(body)


META = st.dictionaries(
    st.sampled_from(
        ["output_token_logprobs", "completion_tokens", "cached_tokens", "weight_version"]
    ),
    JSON | st.lists(st.lists(SCALAR, max_size=3), max_size=3),
)
ANSWER = st.fixed_dictionaries({"meta_info": META}, optional={"output_ids": JSON, "text": JSON})


@BOUNDED
@given(answer=ANSWER)
def test_any_answer_of_an_engine(answer: dict[str, Any]) -> None:
    try:
        ids = output_ids(answer, Limits(max_new_tokens=2, vocab_size=10), where="POST /generate")
    except EngineProtocolError:
        return
    assert len(ids) <= 2
    assert all(type(token) is int and 0 <= token < 10 for token in ids)
