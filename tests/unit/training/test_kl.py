"""KL estimators."""

import math
from typing import get_args

import pytest
import torch

from slime.training.kl import KlKind, kl_estimate

KINDS = get_args(KlKind)


def naive(kind: str, x: float, ratio: float = 1.0) -> float:
    k3 = math.exp(-x) - 1 + x
    value = {"k1": x, "k2": x * x / 2, "k3": k3, "low_var_kl": k3}[kind] * ratio
    return min(max(value, -10.0), 10.0) if kind == "low_var_kl" else value


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_match_their_definition(kind: KlKind) -> None:
    torch.manual_seed(0)
    log_probs, ref = torch.randn(20).double() * 3, torch.randn(20).double() * 3
    log_ratio = torch.randn(20).double()
    expected = [naive(kind, x) for x in (log_probs - ref).tolist()]
    assert kl_estimate(log_probs, ref, kind).tolist() == pytest.approx(expected)
    weighted = [
        naive(kind, x, r)
        for x, r in zip((log_probs - ref).tolist(), log_ratio.exp().tolist(), strict=True)
    ]
    result = kl_estimate(log_probs, ref, kind, importance_ratio=log_ratio.exp())
    assert result.tolist() == pytest.approx(weighted)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("k1", -1.0), ("k2", 0.5), ("k3", math.e - 2), ("low_var_kl", math.e - 2)],
)
def test_by_hand_at_minus_one(kind: KlKind, expected: float) -> None:
    value = kl_estimate(torch.tensor([-2.0]), torch.tensor([-1.0]), kind)
    assert value.item() == pytest.approx(expected)


def test_low_var_kl_is_bounded_after_the_ratio() -> None:
    log_probs, ref = torch.tensor([-8.0, -4.0]), torch.tensor([-1.0, -1.0])
    assert kl_estimate(log_probs, ref, "k3")[0] > 1000
    weighted = kl_estimate(log_probs, ref, "low_var_kl", importance_ratio=torch.tensor([0.001, 1]))
    assert weighted.tolist() == pytest.approx([0.001 * (math.exp(7) - 8), 10.0], rel=1e-5)


def test_k3_keeps_tiny_values_in_fp32() -> None:
    value = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0 - 1e-3]), "k3").item()
    assert value == pytest.approx(5e-7, rel=1e-2)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_expectation_of_unbiased_gradient_is_the_gradient_of_the_kl(kind: KlKind) -> None:
    # All tokens of a 4-way policy, weighted by the old policy they are sampled from.
    torch.manual_seed(1)
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(4).double().log_softmax(0)
    old = torch.randn(4).double().log_softmax(0)
    log_probs = logits.log_softmax(0)
    estimate = kl_estimate(log_probs, ref, kind, importance_ratio=(log_probs - old).exp())
    (gradient,) = torch.autograd.grad((old.exp() * estimate).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((log_probs.exp() * (log_probs - ref)).sum(), logits)
    if kind == "k2":
        # k2 is a biased value: its expectation is E[x^2] / 2, whatever the ratio.
        (exact,) = torch.autograd.grad(
            (logits.log_softmax(0).exp() * (logits.log_softmax(0) - ref).square() / 2).sum(), logits
        )
    torch.testing.assert_close(gradient, exact)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # pyright: ignore[reportArgumentType]
