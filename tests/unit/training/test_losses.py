"""The loss put together from the flags."""

import math
from typing import Any

import pytest
import torch
from support.views import random_view, without

from slime.config.config import Config
from slime.training.algorithms.cispo import CISPO
from slime.training.algorithms.grpo import GRPO
from slime.training.algorithms.gspo import GSPO
from slime.training.interface import LossTerms, TokenView
from slime.training.losses import (
    ICEPOP_PATH,
    PolicyLossOptions,
    make_loss_fn,
    policy_loss,
    policy_loss_options,
)
from slime.training.policy_loss import ClipBounds


def rows(view: TokenView) -> list[dict[str, float]]:
    """One dict of plain numbers per token."""
    columns = {
        **view.columns,
        "log_probs": view.log_probs,
        "entropy": torch.zeros_like(view.log_probs) if view.entropy is None else view.entropy,
    }
    lists = {name: column.tolist() for name, column in columns.items()}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def value(terms: LossTerms, name: str) -> float:
    return float(terms.metrics[name])


def test_all_terms_together_match_a_loop_over_tokens() -> None:
    config = Config(
        eps_clip=0.2,
        eps_clip_high=0.28,
        eps_clip_c=1.3,
        entropy_coef=0.01,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        kl_loss_type="low_var_kl",
        use_unbiased_kl=True,
        use_tis=True,
        tis_clip=1.1,
        tis_clip_low=0.5,
    )
    view = random_view()
    terms = make_loss_fn(config)(view)
    sums: dict[str, float] = {}
    for t in rows(view):
        ratio = math.exp(t["log_probs"] - t["old_log_probs"])
        held, a = min(max(ratio, 0.8), 1.28), t["advantages"]
        pg = max(-ratio * a, -held * a)
        if a < 0:
            pg = min(pg, -1.3 * a)
        tis = math.exp(t["old_log_probs"] - t["rollout_log_probs"])
        pg *= min(max(tis, 0.5), 1.1)
        x = t["log_probs"] - t["ref_log_probs"]
        kl = ratio * (math.exp(-x) - 1 + x)
        values = {
            "loss": pg - 0.01 * t["entropy"] + 0.1 * kl,
            "pg_loss": pg,
            "entropy_loss": t["entropy"],
            "kl_loss": kl,
            "ppo_kl": t["old_log_probs"] - t["log_probs"],
            "pg_clipfrac": -held * a > -ratio * a,
            "ois": ratio,
            "tis": tis,
            "tis_abs": abs(tis - 1),
            "tis_clipfrac": not 0.5 <= tis <= 1.1,
            "train_rollout_logprob_abs_diff": abs(t["old_log_probs"] - t["rollout_log_probs"]),
        }
        for name, number in values.items():
            sums[name] = sums.get(name, 0.0) + t["weight"] * number
    assert terms.loss.item() == pytest.approx(sums.pop("loss"))
    assert {name: float(v) for name, v in terms.metrics.items()} == pytest.approx(sums, rel=1e-5)


def test_loss_by_hand() -> None:
    # one trainable token: ratio 1, advantage 2, entropy 0.5, k1 = 0.25
    view = random_view((1,))
    one = torch.ones(1, dtype=torch.float64)
    columns = {
        "loss_mask": one,
        "weight": one / 4,
        "advantages": 2 * one,
        "old_log_probs": -one,
        "ref_log_probs": -1.25 * one,
    }
    view = TokenView(-one, one / 2, columns, view.segments, 1, view.segment_sum)
    options = PolicyLossOptions(entropy_coef=0.1, kl_loss_coef=0.4)
    terms = policy_loss(view, algorithm=GRPO, options=options)
    assert terms.loss.item() == pytest.approx((-2 - 0.05 + 0.1) / 4)


def test_without_old_log_probs_the_ratio_is_one_and_the_gradient_reinforces() -> None:
    view = without(random_view(), "old_log_probs")
    terms = make_loss_fn(Config())(view)
    terms.loss.backward()
    expected = -view.columns["weight"] * view.columns["advantages"]
    torch.testing.assert_close(view.log_probs.grad, expected)
    assert value(terms, "ppo_kl") == value(terms, "pg_clipfrac") == 0.0
    gap = (view.log_probs.detach() - view.columns["rollout_log_probs"]).abs()
    assert value(terms, "train_rollout_logprob_abs_diff") == pytest.approx(
        float((gap * view.columns["weight"]).sum())
    )


def test_rollout_log_probs_as_old_ones_still_report_the_gap_to_the_trainer() -> None:
    view = without(random_view(), "old_log_probs")
    terms = make_loss_fn(Config(use_rollout_logprobs=True))(view)
    weight = view.columns["weight"]
    gap = view.columns["rollout_log_probs"] - view.log_probs.detach()
    assert value(terms, "ppo_kl") == pytest.approx(float((weight * gap).sum()), rel=1e-5)
    assert value(terms, "train_rollout_logprob_abs_diff") == pytest.approx(
        float((weight * gap.abs()).sum()), rel=1e-5
    )


def test_masked_tokens_change_nothing_whatever_they_hold() -> None:
    config = Config(entropy_coef=0.1, use_kl_loss=True, kl_loss_coef=0.1, use_tis=True)
    views = [random_view(), random_view()]
    for name in ("advantages", "old_log_probs", "ref_log_probs", "rollout_log_probs"):
        views[1].columns[name][1] = 1e6
    results = [make_loss_fn(config)(view) for view in views]
    for terms in results:
        terms.loss.backward()
    assert results[0].loss.item() == results[1].loss.item()
    torch.testing.assert_close(views[0].log_probs.grad, views[1].log_probs.grad)
    assert {n: float(v) for n, v in results[0].metrics.items()} == {
        n: float(v) for n, v in results[1].metrics.items()
    }


@pytest.mark.parametrize("coef", [0.0, 0.3])
def test_entropy_takes_gradient_only_with_a_weight(coef: float) -> None:
    view = random_view()
    terms = make_loss_fn(Config(entropy_coef=coef))(view)
    terms.loss.backward()
    assert view.entropy is not None
    assert "entropy_loss" in terms.metrics
    if coef == 0.0:
        assert view.entropy.grad is None
    else:
        torch.testing.assert_close(view.entropy.grad, -coef * view.columns["weight"])


def test_metrics_carry_no_gradient() -> None:
    terms = make_loss_fn(Config(use_kl_loss=True, kl_loss_coef=0.1))(random_view())
    assert not any(v.requires_grad for v in terms.metrics.values())


def test_icepop_by_its_documented_path_drops_tokens_outside() -> None:
    config = Config(use_tis=True, custom_tis_function_path=ICEPOP_PATH, tis_clip_low=0.9)
    view = random_view()
    terms = make_loss_fn(config)(view)
    terms.loss.backward()
    ratio = (view.columns["old_log_probs"] - view.columns["rollout_log_probs"]).exp()
    outside = (ratio < 0.9) | (ratio > 2.0)
    assert outside.any()
    assert view.log_probs.grad is not None
    assert view.log_probs.grad[outside].abs().max() == 0


def test_opsm_silences_bad_sequences_that_drifted() -> None:
    view = random_view((2, 2), seed=3)
    view.columns["loss_mask"][1] = 1.0
    view.columns["weight"][:] = 0.25
    view.columns["advantages"][:] = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    view.columns["old_log_probs"][:] = 0.0  # far above the current ones
    terms = make_loss_fn(Config(use_opsm=True))(view)
    terms.loss.backward()
    assert view.log_probs.grad is not None
    assert view.log_probs.grad[:2].tolist() == [0.0, 0.0]
    assert value(terms, "opsm_clipfrac") == pytest.approx(0.5)


@pytest.mark.parametrize("algorithm", [GSPO, CISPO])
def test_other_surrogates_run_through_the_same_loss(algorithm: Any) -> None:
    view = random_view()
    terms = policy_loss(view, algorithm=algorithm, options=PolicyLossOptions())
    terms.loss.backward()
    assert view.log_probs.grad is not None
    assert view.log_probs.grad[1] == 0.0  # masked
    assert view.log_probs.grad.abs().sum() > 0


def test_sft_loss_is_the_weighted_negative_log_likelihood() -> None:
    view = random_view(needs_entropy=False)
    terms = make_loss_fn(Config(loss_type="sft_loss"))(view)
    expected = -sum(t["weight"] * t["log_probs"] for t in rows(view))
    assert terms.loss.item() == pytest.approx(expected)
    terms.loss.backward()
    torch.testing.assert_close(view.log_probs.grad, -view.columns["weight"])


def test_upper_clip_defaults_to_the_lower_one() -> None:
    assert policy_loss_options(Config(eps_clip=0.1)).clip == ClipBounds(low=0.1, high=0.1)
