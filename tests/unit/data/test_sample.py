import base64
import copy
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.data.sample import Sample, Status
from slime.errors import DataError, EngineProtocolError


def answer(tokens: list[int], reason: str = "stop", **meta: Any) -> dict[str, Any]:
    """meta_info as an engine writes it."""
    return {
        "finish_reason": {"type": reason},
        "weight_version": "3",
        "prompt_tokens": 4,
        "cached_tokens": 1,
        "completion_tokens": len(tokens),
        "output_token_logprobs": [[-0.5, token, None] for token in tokens],
        **meta,
    }


turns = st.lists(
    st.tuples(st.lists(st.integers(0, 99), max_size=5), st.booleans(), st.text(max_size=3)),
    max_size=8,
)


@given(turns=turns, num_prompt=st.integers(1, 5))
def test_appending_keeps_every_list_aligned(
    turns: list[tuple[list[int], bool, str]], num_prompt: int
) -> None:
    sample = Sample(tokens=list(range(num_prompt)))
    for tokens, trainable, text in turns:
        sample.append_response_tokens(
            None,
            tokens=tokens,
            log_probs=[-1.0] * len(tokens) if trainable else None,
            trainable=trainable,
            text=text,
        )
        sample.validate()
    written = [bit for tokens, trainable, _ in turns for bit in [int(trainable)] * len(tokens)]
    assert sample.tokens == [*range(num_prompt), *(t for tokens, _, _ in turns for t in tokens)]
    assert sample.prompt_length == num_prompt
    assert sample.response == "".join(text for _, _, text in turns)
    assert sample.effective_response_length == sum(written)
    assert (sample.loss_mask or [1] * sample.response_length) == written
    if sample.rollout_log_probs is not None:
        assert sample.rollout_log_probs == [-float(bit) for bit in written]


def test_all_trainable_tokens_need_no_mask() -> None:
    sample = Sample(tokens=[1])
    sample.append_response_tokens(None, tokens=[2, 3], log_probs=[-0.1, -0.2])
    assert sample.loss_mask is None
    assert sample.effective_response_length == 2


def test_tool_output_between_turns_is_masked_and_has_log_prob_zero() -> None:
    sample = Sample(tokens=[1])
    sample.append_response_tokens(None, tokens=[2], meta_info=answer([2]))
    sample.append_response_tokens(None, tokens=[8, 9], trainable=False, text="tool")
    sample.append_response_tokens(None, tokens=[3], meta_info=answer([3], "length"))
    assert sample.loss_mask == [1, 0, 0, 1]
    assert sample.rollout_log_probs == [-0.5, 0.0, 0.0, -0.5]
    assert sample.status is Status.TRUNCATED
    assert sample.weight_versions == ["3", "3"]
    assert sample.prefix_cache_info.prefix_cache_hit_rate == 2 / 8


@pytest.mark.parametrize(
    ("reason", "status"),
    [("stop", Status.COMPLETED), ("length", Status.TRUNCATED), ("abort", Status.ABORTED)],
)
def test_finish_reason_becomes_status(reason: str, status: Status) -> None:
    sample = Sample(tokens=[1])
    sample.append_response_tokens(None, tokens=[2], meta_info=answer([2], reason))
    assert sample.status is status


def test_status_stays_when_it_is_not_the_last_turn() -> None:
    sample = Sample(tokens=[1])
    sample.append_response_tokens(
        None, tokens=[2], meta_info=answer([2]), update_terminal_info=False
    )
    assert sample.status is Status.PENDING
    assert sample.weight_versions == ["3"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"tokens": [2, 3], "log_probs": [-0.1]}, DataError),
        ({"tokens": [2]}, DataError),
        ({"tokens": [2], "meta_info": answer([3])}, EngineProtocolError),
        ({"tokens": [2], "meta_info": answer([2], "tired")}, EngineProtocolError),
    ],
)
def test_a_refused_append_leaves_the_sample_unchanged(
    call: dict[str, Any], error: type[Exception]
) -> None:
    sample = Sample(tokens=[1])
    sample.append_response_tokens(None, tokens=[7], log_probs=[-0.3])
    before = copy.deepcopy(sample)
    with pytest.raises(error):
        sample.append_response_tokens(None, **call)
    assert sample == before


def test_log_probs_of_a_later_turn_only_are_refused() -> None:
    sample = Sample(tokens=[1])
    sample.append_response_tokens(None, tokens=[2])
    with pytest.raises(DataError, match="later turn only"):
        sample.append_response_tokens(None, tokens=[3], log_probs=[-0.1])


def test_appending_never_writes_into_a_shared_list() -> None:
    sample = Sample(tokens=[1])
    sample.append_response_tokens(None, tokens=[2], log_probs=[-0.1])
    sibling = copy.copy(sample)
    sibling.append_response_tokens(None, tokens=[3], log_probs=[-0.2])
    sibling.append_response_tokens(None, tokens=[4], trainable=False)
    assert sample.tokens == [1, 2]
    assert sample.rollout_log_probs == [-0.1]
    sample.validate()


def test_appending_forgets_teacher_log_probs() -> None:
    sample = Sample(tokens=[1, 2], response_length=1, teacher_log_probs=[-1.0])
    sample.append_response_tokens(None, tokens=[3], trainable=False)
    assert sample.teacher_log_probs is None


def test_routed_experts_follow_the_tokens() -> None:
    args = SimpleNamespace(num_layers=2)
    sample = Sample(tokens=[1, 2])

    def encoded(num_tokens: int, value: int) -> str:
        rows = np.full((num_tokens, 2, 3), value, np.int32)
        return base64.b64encode(rows.tobytes()).decode()

    sample.append_response_tokens(
        args, tokens=[3, 4], meta_info=answer([3, 4], routed_experts=encoded(3, 5))
    )
    sample.append_response_tokens(args, tokens=[9], trainable=False)
    sample.validate()
    experts = sample.rollout_routed_experts
    assert experts is not None
    assert experts[:, 0, 0].tolist() == [5, 5, 5, -1]
    # The next turn's answer starts where the last one ended and fills the gap.
    meta = answer([6], routed_experts=encoded(2, 7), routed_experts_start_len=3)
    sample.append_response_tokens(args, tokens=[6], meta_info=meta)
    sample.validate()
    experts = sample.rollout_routed_experts
    assert experts is not None
    assert experts[:, 0, 0].tolist() == [5, 5, 5, 7, 7]


def test_speculative_counters_add_up() -> None:
    sample = Sample(tokens=[1])
    for _ in range(2):
        meta = answer([2], spec_verify_ct=2, spec_accept_token_num=3, spec_draft_token_num=4)
        sample.append_response_tokens(None, tokens=[2], meta_info=meta)
    assert sample.spec_info.spec_accept_rate == 6 / 8
    assert sample.spec_info.spec_accept_length == 2 / 4


@pytest.mark.parametrize(
    ("reward", "key", "expected"),
    [(0.5, None, 0.5), (1, "score", 1.0), ({"score": -1}, "score", -1)],
)
def test_reward_value(reward: Any, key: str | None, expected: float) -> None:
    args = SimpleNamespace(reward_key=key, eval_reward_key=None)
    assert Sample(reward=reward).get_reward_value(args) == expected


def test_eval_reward_key_is_preferred_in_evaluation() -> None:
    args = SimpleNamespace(reward_key="score", eval_reward_key="acc")
    sample = Sample(reward={"score": -1.0, "acc": 0.0})
    assert sample.get_reward_value(args) == -1.0
    assert sample.get_reward_value(args, evaluation=True) == 0.0


@pytest.mark.parametrize("reward", [None, {"acc": 1.0}])
def test_a_reward_that_is_not_there_is_an_error(reward: Any) -> None:
    with pytest.raises(DataError):
        Sample(reward=reward).get_reward_value(SimpleNamespace(reward_key="score"))


def test_dict_round_trip_keeps_status_counters_and_extra_attributes() -> None:
    sample = Sample(prompt="p", tokens=[1], label="l", metadata={"a": 1})
    sample.append_response_tokens(None, tokens=[2], meta_info=answer([2]), text="t")
    vars(sample)["trace"] = [1, 2]
    data = json.loads(json.dumps(sample.to_dict()))
    assert data["status"] == "completed"
    again = Sample.from_dict(data)
    assert again == sample
    assert vars(again)["trace"] == [1, 2]
    assert again.status is Sample.Status.COMPLETED


def test_validate_names_the_list_that_does_not_fit() -> None:
    with pytest.raises(DataError, match="loss_mask has 1 entries, expected 2"):
        Sample(tokens=[1, 2, 3], response_length=2, loss_mask=[1]).validate()
