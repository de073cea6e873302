"""Users' reducers and corrections inside the policy loss."""

from dataclasses import replace

import pytest
import torch
from support import user_losses
from support.views import random_view
from torch import Tensor

from slime.config.config import Config
from slime.errors import ConfigError, DataError
from slime.training.interface import LossTerms, TokenView, WholeSamples
from slime.training.losses import make_loss_fn

LENGTHS = (3, 1, 5)
HERE = "support.user_losses."


def whole_view(owned: Tensor | None = None, num_rollouts: int = 3) -> TokenView:
    """The random view with whole samples; with `owned`, those tokens of it alone."""
    view = random_view(LENGTHS)

    def samples() -> WholeSamples:
        return WholeSamples(
            total_lengths=[n + 2 for n in LENGTHS],
            response_lengths=list(LENGTHS),
            columns={name: list(c.split(LENGTHS)) for name, c in view.columns.items()},
            owned=owned,
            join=lambda values: view.columns["old_log_probs"],
            num_rollouts=num_rollouts,
            num_tokens=8.0,
        )

    if owned is None:
        return replace(view, samples=samples)
    assert view.entropy is not None
    return replace(
        view,
        samples=samples,
        log_probs=view.log_probs[owned],
        entropy=view.entropy[owned],
        columns={name: column[owned] for name, column in view.columns.items()},
        segments=view.segments[owned],
    )


def terms(config: Config, view: TokenView) -> LossTerms:
    return make_loss_fn(config, args="the args")(view)


def test_own_reducer_sums_the_surrogate_and_nothing_else() -> None:
    config = Config(custom_pg_loss_reducer_function_path=f"{HERE}constant_divisor")
    view = whole_view()
    ours, plain = terms(config, view), terms(Config(), view)
    columns = view.columns
    ratio = (view.log_probs.detach() - columns["old_log_probs"]).exp()
    surrogate = torch.maximum(
        -ratio * columns["advantages"], -ratio.clamp(0.8, 1.2) * columns["advantages"]
    )
    expected = (surrogate * columns["loss_mask"]).sum() / 10.0 / 3
    assert float(ours.metrics["pg_loss"]) == pytest.approx(float(expected))
    for name in ("pg_clipfrac", "ppo_kl", "entropy_loss"):
        assert float(ours.metrics[name]) == float(plain.metrics[name])
    assert user_losses.SEEN["total_lengths"] == [5, 3, 7]
    assert user_losses.SEEN["per_token"] is False


def test_results_of_ranks_that_share_sequences_add_up() -> None:
    config = Config(
        custom_pg_loss_reducer_function_path=f"{HERE}constant_divisor",
        custom_tis_function_path=f"{HERE}drop_far_tokens",
        use_tis=True,
    )
    whole = terms(config, whole_view())
    parts = [terms(config, whole_view(torch.arange(rank, 9, 2))) for rank in (0, 1)]
    for name, expected in whole.metrics.items():
        assert float(sum(p.metrics[name] for p in parts)) == pytest.approx(float(expected)), name


def test_own_correction_weighs_and_drops_tokens() -> None:
    config = Config(custom_tis_function_path=f"{HERE}drop_far_tokens", use_tis=True)
    view = whole_view()
    found = terms(config, view)
    columns = view.columns
    ratio = (columns["old_log_probs"] - columns["rollout_log_probs"]).exp()
    kept = columns["weight"] * (ratio > 0.7)
    assert 0 < int((kept != 0).sum()) < int((columns["weight"] != 0).sum())
    policy = (view.log_probs.detach() - columns["old_log_probs"]).exp()
    surrogate = torch.maximum(
        -policy * columns["advantages"], -policy.clamp(0.8, 1.2) * columns["advantages"]
    )
    expected = (surrogate * ratio.clamp(max=1.5) * kept).sum()
    assert float(found.metrics["pg_loss"]) == pytest.approx(float(expected))
    assert float(found.metrics["own_ratio"]) == pytest.approx(float((ratio * kept).sum()))
    assert float(found.metrics["ois"]) == pytest.approx(float((policy * kept).sum()))
    found.loss.backward()
    assert view.log_probs.grad is not None
    assert view.log_probs.grad[kept == 0].abs().max() == 0.0


def test_a_correction_that_only_measures_leaves_the_loss_alone() -> None:
    path = f"{HERE}drop_far_tokens"
    for extra in ({}, {"use_rollout_logprobs": True}):
        plain, measured = whole_view(), whole_view()
        expected = terms(Config(**extra), plain)
        found = terms(
            Config(custom_tis_function_path=path, get_mismatch_metrics=True, **extra), measured
        )
        columns = measured.columns
        ratio = (columns["old_log_probs"] - columns["rollout_log_probs"]).exp()
        assert float(found.metrics["own_ratio"]) == pytest.approx(
            float((ratio * columns["weight"]).sum())
        )
        for name, value in expected.metrics.items():
            assert float(found.metrics[name]) == float(value), name
        expected.loss.backward()
        found.loss.backward()
        assert torch.equal(plain.log_probs.grad, measured.log_probs.grad)  # type: ignore[arg-type]


def test_a_correction_that_does_not_fit_is_refused() -> None:
    config = Config(custom_tis_function_path=f"{HERE}one_mask_short", use_tis=True)
    with pytest.raises(DataError, match=r"one mask \[R\] per sample with R = \[3, 1, 5\]"):
        terms(config, whole_view())


def test_a_path_that_leads_nowhere_is_refused() -> None:
    for config in (
        Config(loss_type="custom_loss"),
        Config(custom_pg_loss_reducer_function_path="support.user_losses.none"),
        Config(custom_tis_function_path="support.user_losses.none", use_tis=True),
    ):
        with pytest.raises(ConfigError):
            make_loss_fn(config)
