"""Denominators, loss columns and means over the round."""

from dataclasses import replace

import pytest
import torch
from support.fake_trainer import run_ranks
from support.rollouts import random_samples

from slime.config.config import Config
from slime.data.batch import RolloutBatch
from slime.data.sample import Sample
from slime.errors import DataError
from slime.training.batching import make_rollout_batches
from slime.training.rollout_data import (
    check_rows,
    loss_columns,
    make_rollout_data,
    mean_metrics,
    token_weights,
)


def batches_of(samples: list[Sample], dp_size: int = 1, size: int = 3) -> list[RolloutBatch]:
    rewards = [float(sample.index or 0) for sample in samples]
    config = Config(global_batch_size=size)
    return make_rollout_batches(samples, rewards, rewards, config, rollout_id=0, dp_size=dp_size)


def fanned_out() -> list[Sample]:
    """Executions of 4 + 2 tokens (one masked), of 1 token, and of 2 tokens that do not train."""
    shapes = [(0, [1, 1, 0, 1]), (0, [1, 1]), (1, [1]), (2, [0, 0])]
    return [
        Sample(
            index=i,
            rollout_id=execution,
            tokens=[1] * (len(mask) + 1),
            response_length=len(mask),
            loss_mask=mask,
        )
        for i, (execution, mask) in enumerate(shapes)
    ]


def test_default_weights_are_means_over_executions_of_means_over_tokens() -> None:
    (batch,) = batches_of(fanned_out())
    weights = token_weights(batch, batch.loss_masks.rows(), per_token=False)
    fifteenth = 1 / (5 * 3)
    assert weights[0].tolist() == pytest.approx([fifteenth, fifteenth, 0, fifteenth])
    assert weights[1].tolist() == pytest.approx([fifteenth] * 2)
    assert weights[2].tolist() == pytest.approx([1 / 3])
    assert weights[3].tolist() == [0, 0]


def test_per_token_weights_are_a_mean_over_all_trainable_tokens() -> None:
    (batch,) = batches_of(fanned_out())
    weights = torch.cat(token_weights(batch, batch.loss_masks.rows(), per_token=True))
    assert weights.tolist() == pytest.approx([1 / 6] * 2 + [0] + [1 / 6] * 4 + [0, 0])


def test_narrower_masks_leave_the_denominator() -> None:
    (batch,) = batches_of(fanned_out())
    masks = [mask.clone() for mask in batch.loss_masks.rows()]
    masks[0][0] = 0.0
    weights = token_weights(batch, masks, per_token=False)
    assert weights[0].tolist() == pytest.approx([0, 1 / 15, 0, 1 / 15])


def test_step_without_trainable_tokens_has_zero_weights() -> None:
    samples = fanned_out()
    for sample in samples:
        sample.remove_sample = True
    (batch,) = batches_of(samples)
    for per_token in (False, True):
        weights = torch.cat(token_weights(batch, batch.loss_masks.rows(), per_token=per_token))
        assert weights.abs().sum() == 0


def test_sample_of_no_step_weighs_nothing() -> None:
    (batch,) = batches_of(fanned_out())
    (plan,) = batch.steps
    batch.steps = (replace(plan, micro_batches=((0,), (2,))),)
    weights = token_weights(batch, batch.loss_masks.rows(), per_token=False)
    assert [bool(row.any()) for row in weights] == [True, False, True, False]
    assert weights[1].tolist() == [0.0, 0.0]


def test_loss_columns_take_what_is_there() -> None:
    (batch,) = batches_of(random_samples(num_groups=1, group_size=3))
    data = make_rollout_data(batch)
    assert set(loss_columns(batch, data, per_token=False)) == {
        "loss_mask",
        "weight",
        "rollout_log_probs",
    }
    data["log_probs"] = [row.double() for row in data["rollout_log_probs"]]
    columns = loss_columns(batch, data, per_token=False)
    assert columns["old_log_probs"][0].dtype == torch.float32


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_means_are_the_same_for_any_number_of_ranks(dp_size: int) -> None:
    samples = random_samples(
        num_groups=2, group_size=3, seed=4, max_fan_out=2, mask_probability=0.3
    )
    samples[0].metadata["round_number"] = 3
    samples[2].metadata["round_number"] = 5
    samples[1].status = Sample.Status.TRUNCATED
    batches = batches_of(samples, dp_size)
    metrics = run_ranks(
        dp_size,
        lambda rank, group: mean_metrics(
            batches[rank],
            make_rollout_data(batches[rank]),
            lambda tensor: group.all_reduce(rank, tensor),
        ),
    )
    assert all(m == metrics[0] for m in metrics)
    expected_log_prob = 0.0
    for execution in range(6):
        family = [s for s in samples if s.rollout_id == execution]
        pairs = [
            (lp, m)
            for s in family
            for lp, m in zip(s.rollout_log_probs or [], s.loss_mask or [], strict=True)
        ]
        total = sum(m for _, m in pairs)
        expected_log_prob += sum(lp * m for lp, m in pairs) / max(total, 1) / 6
    assert metrics[0] == pytest.approx(
        {
            "rollout_log_probs": expected_log_prob,
            "rewards": sum(range(len(samples))) / len(samples),
            "raw_reward": sum(range(len(samples))) / len(samples),
            "response_lengths": sum(s.response_length for s in samples) / len(samples),
            "total_lengths": sum(len(s.tokens) for s in samples) / len(samples),
            "truncated": 1 / len(samples),
            "round_number": 4.0,
        }
    )


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("advantages", None, "must fill"),
        ("advantages", [torch.zeros(99)] * 4, "one tensor"),
        ("returns", [[0.0]] * 4, "one tensor"),
    ],
)
def test_unusable_hook_results_are_refused(name: str, rows: object, message: str) -> None:
    (batch,) = batches_of(fanned_out())
    data = make_rollout_data(batch)
    for column in ("advantages", "returns"):
        data[column] = [torch.zeros_like(mask) for mask in data["loss_masks"]]
    data[name] = rows
    with pytest.raises(DataError, match=message):
        check_rows(data, "--some-path", required=("advantages", "returns"))
