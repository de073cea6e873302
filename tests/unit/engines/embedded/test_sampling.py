"""Sampling follows SGLang: what is cut, what is drawn, and which log-prob is reported."""

from typing import Any

import numpy as np
import pytest
import torch

from slime.engines.embedded.sampling import SamplingColumns, edit_logits, sample
from slime.engines.protocol import NO_LIMIT, SamplingParams

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))


def columns(rows: int, uniform: Any, **values: Any) -> SamplingColumns:
    def column(name: str, default: float, dtype: Any) -> Any:
        return np.full(rows, values.get(name, default), dtype)

    return SamplingColumns(
        temperature=column("temperature", 1.0, np.float32),
        top_p=column("top_p", 1.0, np.float32),
        top_k=column("top_k", NO_LIMIT, np.int64),
        min_p=column("min_p", 0.0, np.float32),
        uniform=np.full(rows, uniform, np.float64),
    )


def drawn_tokens(count: int = 1000, **values: Any) -> np.ndarray:
    """Tokens for `count` evenly spread uniforms: their frequencies are the probabilities."""
    uniform = (np.arange(count) + 0.5) / count
    tokens, _ = sample(LOGITS.expand(count, -1).clone(), columns(count, uniform, **values))
    return np.bincount(tokens, minlength=4) / count


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"min_p": 0.25}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        ({"top_k": 3, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
    ],
)
def test_frequencies_are_the_truncated_probabilities(
    values: dict[str, Any], expected: list[float]
) -> None:
    # A thousand evenly spaced draws: off by one draw at each boundary at most.
    assert np.abs(drawn_tokens(**values) - expected).max() <= 0.0015


def test_log_prob_is_that_of_the_untruncated_distribution() -> None:
    for values in ({}, {"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.25}):
        tokens, log_probs = sample(LOGITS.clone(), columns(1, 0.7, **values))
        assert log_probs[0] == pytest.approx(float(LOGITS[0, tokens[0]]), abs=1e-6)


def test_log_prob_includes_the_temperature() -> None:
    tokens, log_probs = sample(LOGITS.clone(), columns(1, 0.7, temperature=2.0))
    expected = torch.log_softmax(LOGITS / 2.0, -1)[0, tokens[0]]
    assert log_probs[0] == pytest.approx(float(expected), abs=1e-6)


def test_rows_with_different_needs_do_not_disturb_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    rows = [
        columns(1, 0.1 + 0.15 * i, **values)
        for i, values in enumerate(
            [{}, {"top_k": 1}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.3}, {"temperature": 0.5}]
        )
    ]
    names = ("temperature", "top_p", "top_k", "min_p", "uniform")
    joined = SamplingColumns(*(np.concatenate([getattr(r, n) for r in rows]) for n in names))
    tokens, log_probs = sample(logits.clone(), joined)
    for i, row in enumerate(rows):
        token, log_prob = sample(logits[i : i + 1].clone(), row)
        assert token[0] == tokens[i]
        assert log_prob[0] == log_probs[i]


def test_the_largest_uniform_never_draws_an_impossible_token() -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, :10] = torch.randn(10, generator=torch.Generator().manual_seed(0))
    tokens, log_probs = sample(logits, columns(1, np.nextafter(1.0, 0.0)))
    assert tokens[0] < 10
    assert np.isfinite(log_probs[0])


def test_logits_without_numbers_give_a_log_prob_without_number() -> None:
    _, log_probs = sample(torch.full((1, 4), torch.nan), columns(1, 0.5))
    assert not np.isfinite(log_probs[0])


def test_penalties_look_at_the_answer_only() -> None:
    row = torch.tensor([1.0, -1.0, 2.0, 0.0])
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    edit_logits(row, params, np.array([0, 0, 1], np.int32), ())
    assert row.tolist() == [1.0 - 2 * 0.5 - 0.25, -1.0 - 0.5 - 0.25, 2.0, 0.0]


def test_repetition_penalty_shrinks_positive_and_grows_negative_logits() -> None:
    row = torch.tensor([1.0, -1.0, 2.0])
    edit_logits(row, SamplingParams(repetition_penalty=2.0), np.array([0, 1], np.int32), ())
    assert row.tolist() == [0.5, -2.0, 2.0]


def test_stop_tokens_are_impossible_before_min_new_tokens() -> None:
    params = SamplingParams(min_new_tokens=2)
    row = torch.zeros(4)
    edit_logits(row, params, np.array([3], np.int32), (0, 1))
    assert row.tolist() == [-torch.inf, -torch.inf, 0.0, 0.0]
    row = torch.zeros(4)
    edit_logits(row, params, np.array([3, 3], np.int32), (0, 1))
    assert row.tolist() == [0.0] * 4
