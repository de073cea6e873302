import itertools
import math
import statistics
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rollout_world import make_args

from slime.data.sample import Sample
from slime.engines.usage import Usage
from slime.observability.metrics import find
from slime.rollout.metrics import (
    MIN_ZERO_STD,
    REPETITION_RATIO,
    eval_metrics,
    is_repetitive,
    pass_at_k,
    rollout_metrics,
    sample_metrics,
    zero_std_metrics,
)

Status = Sample.Status


def make_sample(group: int, reward: Any, length: int = 4, **fields: Any) -> Sample:
    fields.setdefault("status", Status.COMPLETED)
    return Sample(
        group_index=group,
        tokens=[1] * (2 + length),
        response_length=length,
        reward=reward,
        response="x" * length,
        **fields,
    )


def args(**overrides: Any) -> Any:
    return make_args("http://127.0.0.1:1", **overrides)


def test_round_is_summed_up():
    samples = [
        make_sample(0, 1.0, 4),
        make_sample(0, 1.0, 8, loss_mask=[1] * 6 + [0] * 2),
        make_sample(1, 0.0, 2, status=Status.TRUNCATED),
        make_sample(1, 1.0, 6),
    ]
    samples[0].prefix_cache_info.cached_tokens = 3
    samples[0].prefix_cache_info.total_prompt_tokens = 4
    metrics = rollout_metrics(samples, args(rollout_num_gpus=2), 2.0)
    assert metrics == {
        "rollout/response_len/mean": 5.0,
        "rollout/response_len/median": 5.0,
        "rollout/response_len/max": 8,
        "rollout/response_len/min": 2,
        "rollout/truncated_ratio": 0.25,
        "rollout/repetition_frac": 0.0,
        "rollout/zero_std/count_1.0": 1,
        "rollout/prefix_cache_hit_rate": 0.75,
        "rollout/avg_cached_tokens_per_sample": 0.75,
        "rollout/raw_reward": 0.75,
        "perf/tokens_per_gpu_per_sec": 5.0,
        "perf/effective_tokens_per_gpu_per_sec": 4.5,
        "perf/longest_sample_tokens_per_sec": 4.0,
        "perf/longest_effective_sample_tokens_per_sec": 3.0,
    }
    assert all(find(name) for name in metrics)


def test_usage_of_custom_functions_is_summed_up_per_execution():
    first = Usage(requests=3, tokens_in=60, tokens_out=9, engine_time_s=1.0)
    second = Usage(requests=1, tokens_in=10, tokens_out=3, engine_time_s=0.5)
    second.tool_calls, second.tool_errors = 4, 1
    samples = [make_sample(0, 1.0), make_sample(0, 0.0), make_sample(0, 1.0)]
    samples[0].usage = first.added_to({}, seconds=1.5)
    samples[2].usage = second.added_to({}, seconds=0.5)  # samples[1] is its sibling
    metrics = rollout_metrics(samples, args(), 1.0)
    assert metrics["rollout/usage/requests/mean"] == 2.0
    assert metrics["rollout/usage/tokens_in/max"] == 60.0
    assert metrics["rollout/usage/tokens_out/min"] == 3.0
    assert metrics["rollout/usage/engine_time/mean"] == 0.75
    assert metrics["rollout/usage/other_time/max"] == 0.5
    assert metrics["rollout/usage/tool_calls/max"] == 4.0
    assert metrics["rollout/usage/tool_error_ratio"] == 0.25
    assert all(find(name) for name in metrics)


def test_failed_samples_are_counted_by_category_and_left_out_of_rewards():
    failed = make_sample(0, None, status=Status.FAILED, remove_sample=True)
    failed.metadata["error_cat"] = "reward"
    metrics = rollout_metrics([failed, make_sample(0, 1.0)], args(), 1.0)
    assert metrics["rollout/error_cat/reward"] == 0.5
    assert metrics["rollout/raw_reward"] == 1.0
    assert metrics["perf/effective_tokens_per_gpu_per_sec"] == 4.0
    assert "rollout/raw_reward" not in rollout_metrics([failed], args(), 1.0)


def test_reward_category_is_taken_from_the_reward_dict():
    rewards: list[dict[str, Any]] = [{"score": 1, "kind": "fine"}, {"score": 0, "kind": "format"}]
    samples = [make_sample(i, reward) for i, reward in enumerate(rewards)]
    metrics = rollout_metrics(samples, args(reward_key="score", log_reward_category="kind"), 1.0)
    assert metrics["rollout/error_cat/format"] == 0.5
    assert metrics["rollout/raw_reward"] == 0.5


def test_speculative_decoding_is_pooled_over_samples():
    samples = [make_sample(0, 1.0), make_sample(1, 1.0)]
    for sample, accepted in zip(samples, (3, 1), strict=True):
        sample.spec_info.add(
            {
                "spec_verify_ct": 2,
                "spec_accept_token_num": accepted,
                "spec_draft_token_num": 4,
                "completion_tokens": 5,
            }
        )
    metrics = sample_metrics(samples, args())
    assert (metrics["spec_accept_rate"], metrics["spec_accept_length"]) == (0.5, 2.5)


def test_time_on_tools_is_taken_off_the_longest_sample():
    samples = [make_sample(0, 1.0, 8, non_generation_time=1.0), make_sample(1, 1.0, 2)]
    metrics = rollout_metrics(samples, args(), 3.0)
    assert metrics["perf/longest_sample_tokens_per_sec_without_non_generation"] == 4.0
    assert metrics["perf/longest_sample_non_generation_time"] == 1.0
    assert metrics["perf/non_generation_time/max"] == 1.0


def test_flags_add_pass_rate_turns_and_correct_samples():
    samples = [make_sample(0, float(i % 2), 4 + i, metadata={"round_number": i}) for i in range(4)]
    on = args(log_passrate=True, log_multi_turn=True, log_correct_samples=True)
    metrics = rollout_metrics(samples, on, 1.0)
    assert metrics["passrate/pass@1"] == 0.5
    assert metrics["passrate/pass@2"] == pytest.approx(5 / 6)
    assert metrics["passrate/pass@4"] == 1.0
    assert metrics["multi_turn/multi_turn_metric/round_number_max"] == 3
    assert metrics["multi_turn/raw_response_length/response_length_mean"] == 5.5
    assert metrics["multi_turn/wo_obs_response_length/response_length_clip_ratio"] == 0.0
    assert metrics["rollout/correct_samples/response_len/mean"] == 6.0


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=3))
def test_pass_at_k_is_the_share_of_subsets_with_a_solution(groups: list[list[bool]]):
    rewards = {i: [float(solved) for solved in group] for i, group in enumerate(groups)}
    for k, value in pass_at_k(rewards).items():
        shares = [
            statistics.fmean(any(subset) for subset in itertools.combinations(group, k))
            for group in groups
            if len(group) >= k
        ]
        assert value == pytest.approx(statistics.fmean(shares))


def test_pass_at_k_takes_the_group_size_of_each_dataset():
    data = {
        "many": {
            "rewards": [1, 0, 0, 0],
            "truncated": [0, 0, 0, 1],
            "samples": [make_sample(0, reward) for reward in (1, 0, 0, 0)],
        },
        "one": {"rewards": [1.0], "truncated": [0], "samples": [make_sample(0, 1.0)]},
        "empty": {"rewards": [], "truncated": [], "samples": []},
    }
    metrics = eval_metrics(data, args(log_passrate=True, n_samples_per_eval_prompt=2))
    assert metrics["eval/many"] == 0.25
    assert metrics["eval/many-truncated_ratio"] == 0.25
    assert [metrics[f"eval/many-pass@{k}"] for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert metrics["eval/many/response_len/mean"] == 4.0
    assert metrics["eval/one-pass@1"] == 1.0
    assert "eval/one-pass@2" not in metrics
    assert not any("empty" in name for name in metrics)
    assert all(find(name) for name in metrics)


def test_evaluation_may_come_without_samples():
    assert eval_metrics({"x": {"rewards": [1.0, 0.0]}}, args()) == {"eval/x": 0.5}


def test_fan_out_counts_once_in_its_group():
    samples = [make_sample(0, 1.0, rollout_id=0)] * 3 + [make_sample(0, 0.0, rollout_id=1)]
    metrics = rollout_metrics(samples, args(log_passrate=True), 1.0)
    assert metrics["passrate/pass@1"] == 0.5


@given(
    st.lists(st.sampled_from([0.0, 1.0, 1 + 1e-7, 1 + 9e-7, 1 + 2e-6, 1 + 4e-6, 5.0]), min_size=2)
)
def test_groups_without_spread_are_those_of_the_exact_deviation(rewards: list[float]):
    is_counted = bool(zero_std_metrics({0: rewards}))
    assert is_counted == (statistics.pstdev(rewards) <= MIN_ZERO_STD)


def test_groups_with_a_reward_that_is_no_number_are_not_counted():
    assert zero_std_metrics({0: [math.nan, math.nan], 1: [0.0, math.nan, 0.0]}) == {}


def test_short_text_is_judged_as_by_compressing_it():
    for count in range(1, 200):
        text = "a" * count
        ratio = count / len(zlib.compress(text.encode(), 1))
        assert is_repetitive(text) == (ratio > REPETITION_RATIO)


def test_repetition_is_told_from_prose():
    assert is_repetitive("the same again. " * 200)
    assert not is_repetitive("")
    assert not is_repetitive("".join(chr(33 + (i * i * 31 + i // 7) % 90) for i in range(3000)))


def test_samples_of_several_policies_are_counted_where_there_are_any():
    samples = [make_sample(0, 1.0) for _ in range(4)]
    samples[0].version_spans = [(0, "3"), (2, "4")]
    samples[1].version_spans = [(0, "3..4")]
    samples[2].version_spans = [(0, "4"), (1, ""), (3, "4")]
    metrics = sample_metrics(samples, args())
    assert (metrics["mixed_versions_ratio"], metrics["unknown_split_ratio"]) == (0.5, 0.25)
    assert find("rollout/mixed_versions_ratio")
    assert "mixed_versions_ratio" not in sample_metrics(samples[2:], args())
