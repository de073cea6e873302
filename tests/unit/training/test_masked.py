"""Masked reductions and whitening."""

import pytest
import torch
from support.fake_trainer import run_ranks

from slime.training.masked import masked_mean, masked_sum, segment_mean, whiten


def test_masked_mean_by_hand() -> None:
    values, mask = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 1.0])
    assert masked_mean(values, mask, 4.0).item() == pytest.approx(1.25)


def test_masked_out_nan_and_inf_do_not_spread() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    total = masked_sum(values, torch.tensor([2.0, 0.0, 0.0]))
    total.backward()
    assert total.item() == 2.0
    assert values.grad is not None
    assert values.grad.tolist() == [2.0, 0.0, 0.0]


def test_segment_mean_is_taken_over_each_response() -> None:
    segments = torch.tensor([0, 0, 1, 1, 1])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    values = torch.tensor([1.0, 3.0, 5.0, 100.0, 7.0])
    mean = segment_mean(values, mask, segments, lambda x: torch.zeros(2).index_add(0, segments, x))
    assert mean.tolist() == [2.0, 2.0, 6.0, 6.0, 6.0]


def test_segment_without_trainable_tokens_has_mean_zero() -> None:
    segments = torch.tensor([0, 0])
    mean = segment_mean(
        torch.ones(2), torch.zeros(2), segments, lambda x: torch.zeros(1).index_add(0, segments, x)
    )
    assert mean.tolist() == [0.0, 0.0]


def test_whitened_tokens_have_mean_zero_and_variance_one() -> None:
    torch.manual_seed(0)
    rows = [torch.randn(n) * 3 + 1000 for n in (4, 1, 7)]
    masks = [torch.ones(4), torch.zeros(1), (torch.arange(7) % 2 == 0).float()]
    white = torch.cat(whiten(rows, masks, lambda x: x))[torch.cat(masks) == 1]
    kept = torch.cat(rows)[torch.cat(masks) == 1].double()
    expected = (kept - kept.mean()) / kept.std()
    torch.testing.assert_close(white.double(), expected, atol=1e-6, rtol=1e-6)


def test_whitening_by_hand() -> None:
    white = whiten([torch.tensor([1.0, 3.0])], [torch.ones(2)], lambda x: x)
    assert white[0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


def test_whitening_is_the_same_however_ranks_share_the_rows() -> None:
    torch.manual_seed(1)
    rows = [torch.randn(n) for n in (3, 5, 2, 4)]
    masks = [(torch.rand(n) > 0.3).float() for n in (3, 5, 2, 4)]
    whole = whiten(rows, masks, lambda x: x)
    cuts = [slice(0, 1), slice(1, 4), slice(4, 4)]  # the last rank has no sample
    parts = run_ranks(
        3,
        lambda rank, group: whiten(
            rows[cuts[rank]], masks[cuts[rank]], lambda x: group.all_reduce(rank, x)
        ),
    )
    torch.testing.assert_close([row for part in parts for row in part], whole)


def test_whitening_of_nothing_trainable_is_finite() -> None:
    assert whiten([torch.ones(2)], [torch.zeros(2)], lambda x: x)[0].isfinite().all()
