"""The critic's loss against a loop over tokens."""

from dataclasses import replace

import pytest
import torch
from support.views import random_view

from slime.training.interface import TokenView
from slime.training.value_loss import held_values, value_loss

CLIP = 0.2


def critic_view(seed: int = 0) -> TokenView:
    view = random_view(seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    count = len(view.log_probs)
    columns = {
        **view.columns,
        "returns": torch.randn(count, generator=generator, dtype=torch.float64),
        "old_values": 0.3 * torch.randn(count, generator=generator, dtype=torch.float64),
    }
    values = 0.3 * torch.randn(count, generator=generator, dtype=torch.float64)
    return replace(view, values=values.requires_grad_(), columns=columns)


def test_loss_and_metrics_match_a_loop_over_tokens() -> None:
    view = critic_view()
    assert view.values is not None
    terms = value_loss(view, clip=CLIP)
    loss = clipped = 0.0
    columns = [view.columns[n].tolist() for n in ("weight", "returns", "old_values")]
    for value, weight, target, old in zip(view.values.tolist(), *columns, strict=True):
        held = min(max(value, old - CLIP), old + CLIP)
        loss += weight * max((value - target) ** 2, (held - target) ** 2)
        clipped += weight * (abs(value - old) > CLIP)
    assert 0 < clipped < 1
    assert float(terms.loss.detach()) == pytest.approx(loss, rel=1e-12)
    assert float(terms.metrics["value_loss"]) == pytest.approx(loss, rel=1e-12)
    assert float(terms.metrics["value_clipfrac"]) == pytest.approx(clipped, rel=1e-12)
    assert not any(metric.requires_grad for metric in terms.metrics.values())


def test_a_value_worked_out_by_hand() -> None:
    """v = 1, old 0, clip 0.2, R = 0.5: free 0.25, held at 0.2 is 0.09; the larger counts."""
    view = critic_view()
    one = torch.ones(1, dtype=torch.float64)
    columns = {"weight": one, "returns": 0.5 * one, "old_values": 0.0 * one}
    terms = value_loss(replace(view, values=one, columns=columns), clip=CLIP)
    assert float(terms.loss.detach()) == pytest.approx(0.25)


def test_a_value_that_left_the_clip_towards_its_return_has_no_gradient() -> None:
    values = torch.tensor([0.9, -0.9], requires_grad=True)
    columns = {"weight": torch.ones(2), "returns": torch.ones(2), "old_values": torch.zeros(2)}
    value_loss(replace(critic_view(), values=values, columns=columns), clip=CLIP).loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.0, 2 * (-0.9 - 1)])
    torch.testing.assert_close(held_values(values, torch.zeros(2), CLIP), torch.tensor([0.2, -0.2]))


def test_masked_tokens_may_hold_anything() -> None:
    view = critic_view()
    assert view.values is not None
    columns = {**view.columns, "returns": view.columns["returns"].clone()}
    columns["returns"][1] = torch.nan
    found = value_loss(replace(view, columns=columns), clip=CLIP)
    expected = value_loss(view, clip=CLIP)
    assert float(found.loss.detach()) == float(expected.loss.detach())
    found.loss.backward()
    assert view.values.grad is not None
    assert view.values.grad.isfinite().all()
