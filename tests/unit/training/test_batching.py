"""Samples as columns, and columns as one batch per data-parallel rank."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rollouts import random_samples

from slime.config.config import Config
from slime.data.batch import FILLER_INDEX, RolloutBatch
from slime.data.sample import Sample
from slime.errors import DataError
from slime.training.batching import (
    batch_metrics,
    batches_from_train_data,
    make_rollout_batches,
)
from slime.training.train_data import complete_train_data, samples_to_train_data


def make(samples: list[Sample], config: Config, dp_size: int = 1) -> list[RolloutBatch]:
    rewards = [float(sample.index or 0) for sample in samples]
    return make_rollout_batches(samples, rewards, rewards, config, rollout_id=3, dp_size=dp_size)


def real_rows(batches: list[RolloutBatch]) -> list[tuple[RolloutBatch, int]]:
    return [(b, i) for b in batches for i in range(len(b)) if b.sample_indices[i] != FILLER_INDEX]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([None, 12, 40]), st.booleans())
def test_every_kept_sample_arrives_once_and_whole(
    seed: int, dp_size: int, cap: int | None, balance: bool
) -> None:
    samples = random_samples(
        num_groups=3, group_size=4, seed=seed, max_fan_out=3, mask_probability=0.3
    )
    config = Config(
        global_batch_size=5,
        use_dynamic_batch_size=cap is not None,
        max_tokens_per_gpu=cap,
        balance_data=balance,
    )
    batches = make(samples, config, dp_size)
    kept = [sample for sample in samples if (sample.rollout_id or 0) < 10]
    rows = real_rows(batches)
    assert sorted(b.sample_indices[i] for b, i in rows) == [sample.index for sample in kept]
    for batch, i in rows:
        sample = samples[batch.sample_indices[i]]
        assert batch.tokens.rows()[i].tolist() == sample.tokens
        assert batch.loss_masks.rows()[i].tolist() == sample.loss_mask
        assert batch.rewards[i] == float(sample.index or 0)
        assert batch.rollout_ids[i] == sample.rollout_id
        family = [s for s in samples if s.rollout_id == sample.rollout_id]
        assert batch.rollout_mask_sums[i] == sum(s.effective_response_length for s in family)
        assert batch.rollout_log_probs is not None
        assert batch.rollout_log_probs.rows()[i].tolist() == pytest.approx(sample.rollout_log_probs)
    for batch in batches:
        positions = [p for plan in batch.steps for m in plan.micro_batches for p in m]
        assert positions == list(range(len(batch)))
        for number, plan in enumerate(batch.steps):
            step = [s for s in samples if (s.rollout_id or 0) // 5 == number]
            assert plan.num_rollouts == 5
            assert plan.num_samples == len(step)
            assert plan.num_tokens == sum(s.effective_response_length for s in step)


def test_removed_sample_counts_but_does_not_train() -> None:
    samples = random_samples(num_groups=1, group_size=2)
    samples[0].remove_sample = True
    (batch,) = make(samples, Config(global_batch_size=2))
    assert batch.loss_masks.rows()[0].sum() == 0
    assert batch.rollout_mask_sums[0] == 0
    assert batch.steps[0].num_rollouts == 2


def test_trailing_executions_are_warned_of_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    samples = random_samples(num_groups=1, group_size=7, max_fan_out=2, seed=1)
    with caplog.at_level(logging.WARNING):
        batches = make(samples, Config(global_batch_size=3), dp_size=1)
    dropped = [sample for sample in samples if sample.rollout_id == 6]
    assert f"1 executions ({len(dropped)} samples)" in caplog.text
    metrics = batch_metrics(len(samples), 7, batches)
    assert metrics["dropped_executions"] == 1
    assert metrics["dropped_samples"] == len(dropped)
    assert metrics["filler_samples"] == 0
    assert metrics["num_micro_batches"] == len(samples) - len(dropped)


def test_filler_stands_where_a_rank_has_no_sample() -> None:
    samples = random_samples(num_groups=1, group_size=3)
    samples[1].tokens, samples[1].response_length = [4, 5, 6], 1
    samples[1].loss_mask, samples[1].rollout_log_probs = [1], [-1.0]
    batches = make(samples, Config(global_batch_size=3), dp_size=2)
    assert [len(batch) for batch in batches] == [2, 2]
    filler = batches[1]
    assert filler.sample_indices == (1, FILLER_INDEX)
    assert filler.tokens.rows()[1].tolist() == [4, 5]
    assert filler.response_lengths[1] == 1
    assert filler.loss_masks.rows()[1].tolist() == [0.0]
    assert filler.rollout_mask_sums[1] == 0.0
    assert filler.steps[0].num_samples == 3
    assert batch_metrics(3, 3, batches)["filler_samples"] == 1


def test_status_round_and_plugin_columns_travel() -> None:
    samples = random_samples(num_groups=1, group_size=2)
    samples[0].status = Sample.Status.TRUNCATED
    samples[1].metadata["round_number"] = 4
    samples[1].train_metadata = {"tool": "python"}
    samples[0].rollout_routed_experts = np.zeros((len(samples[0].tokens) - 1, 2, 1), np.int32)
    (batch,) = make(samples, Config(global_batch_size=2))
    assert batch.rollout_id == 3
    assert batch.truncated == (True, False)
    assert batch.extras["round_number"] == [None, 4]
    assert batch.extras["metadata"] == [None, {"tool": "python"}]
    assert batch.rollout_routed_experts is not None
    assert batch.rollout_routed_experts[1] is None
    assert "source_names" not in batch.extras


def test_routed_experts_travel_narrow_and_a_filler_has_none() -> None:
    samples = random_samples(num_groups=1, group_size=3, seed=0)
    for sample in samples:
        shape = (len(sample.tokens) - 1, 3, 2)
        experts = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        sample.rollout_routed_experts = experts + (sample.index or 0)
    batches = make(samples, Config(global_batch_size=3), dp_size=2)
    for batch in batches:
        assert batch.rollout_routed_experts is not None
        for index, experts in zip(batch.sample_indices, batch.rollout_routed_experts, strict=True):
            if index == FILLER_INDEX:
                assert experts is None
                continue
            assert experts is not None
            assert experts.dtype == torch.int16
            expected = samples[index].rollout_routed_experts
            assert expected is not None
            assert experts.tolist() == expected.tolist()
    assert any(FILLER_INDEX in batch.sample_indices for batch in batches)


@pytest.mark.parametrize("wrong", [[[0]], np.zeros((3, 2, 1)), np.full((3, 2, 1), 2**15)])
def test_what_are_no_numbers_of_experts_names_the_sample(wrong: Any) -> None:
    data = {"tokens": [[1, 2, 3, 4]], "response_lengths": [2], "rewards": [0.0]}
    data["rollout_routed_experts"] = [wrong]
    with pytest.raises(DataError, match="sample 0: rollout_routed_experts must be numbers"):
        batches_from_train_data(data, Config(global_batch_size=1), rollout_id=0, dp_size=1)


def test_custom_train_data_takes_the_same_road() -> None:
    samples = random_samples(num_groups=2, group_size=2, seed=5, max_fan_out=2)
    rewards = [1.0] * len(samples)
    config = Config(global_batch_size=4)
    data: dict[str, Any] = samples_to_train_data(samples, rewards, rewards)
    data["colour"] = [f"c{i}" for i in range(len(samples))]
    (own,) = batches_from_train_data(data, config, rollout_id=3, dp_size=1)
    (default,) = make_rollout_batches(samples, rewards, rewards, config, rollout_id=3, dp_size=1)
    assert own.extras.pop("colour") == [f"c{i}" for i in own.sample_indices]
    assert own.tokens.values.tolist() == default.tokens.values.tolist()
    assert own.rollout_mask_sums == default.rollout_mask_sums
    assert own.steps == default.steps


def test_minimal_train_data_is_completed() -> None:
    data = complete_train_data(
        {"tokens": [[1, 2, 3], [4, 5]], "response_lengths": [2, 1], "rewards": [1.0, 0.0]}
    )
    assert data["loss_masks"] == [[1, 1], [1]]
    assert data["raw_reward"] == [1.0, 0.0]
    assert data["rollout_ids"] == data["sample_indices"] == [0, 1]
    assert data["rollout_mask_sums"] == [2.0, 1.0]
    assert data["truncated"] == [0, 0]


def test_log_probs_may_miss_only_where_nothing_trains() -> None:
    samples = random_samples(num_groups=1, group_size=3)
    samples[1].rollout_log_probs = None
    with pytest.raises(DataError, match="sample 1 trains but has no rollout_log_probs"):
        make(samples, Config(global_batch_size=3))
    samples[1].remove_sample = True
    (batch,) = make(samples, Config(global_batch_size=3))
    assert batch.rollout_log_probs is not None
    assert batch.rollout_log_probs.rows()[1].sum() == 0
    for sample in samples:
        sample.rollout_log_probs = None
    (batch,) = make(samples, Config(global_batch_size=3))
    assert batch.rollout_log_probs is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_lengths": [3]}, "response_length 3 of 3 tokens"),
        ({"loss_masks": [[1]]}, "1 loss_masks for 2"),
        ({"rewards": [None]}, "expected a number"),
        ({"truncated": [0, 1]}, "2 entries for 1 samples"),
    ],
)
def test_columns_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    data = {"tokens": [[1, 2, 3]], "response_lengths": [2], "rewards": [0.0]} | change
    with pytest.raises(DataError, match=message):
        complete_train_data(data)


def test_missing_required_column_is_named() -> None:
    with pytest.raises(DataError, match="rewards"):
        complete_train_data({"tokens": [], "response_lengths": []})
