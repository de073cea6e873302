"""The way of tokens to experts and back, against a plain loop."""

import pytest
import torch
from torch import Tensor

import slime.backends.megatron  # noqa: F401 (gives Megatron its answers for a CPU first)
from slime.backends.megatron.layers.dispatch import Places, _on_this_rank

TOKENS, EXPERTS, CHOSEN, HIDDEN = 9, 5, 2, 4


def random_probs(seed: int) -> Tensor:
    """[TOKENS, EXPERTS], more than 0 for CHOSEN of them in each row."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    chosen = scores.topk(CHOSEN, dim=1).indices
    return torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))


@pytest.mark.parametrize("seed", range(3))
def test_every_mark_has_one_place_and_places_are_column_by_column(seed: int) -> None:
    marks = random_probs(seed) > 0.0
    places, columns = Places.of_marks(marks, CHOSEN, TOKENS * CHOSEN)
    pairs = list(zip(columns.tolist(), places.rows.tolist(), strict=True))
    assert pairs == sorted((c, r) for r, c in marks.nonzero().tolist())
    for row in range(TOKENS):
        assert [int(places.rows[i]) for i in places.places[row]] == [row] * CHOSEN


def test_rows_with_fewer_marks_than_others_leave_places_empty() -> None:
    marks = torch.tensor([[True, True, False], [False, False, False], [False, False, True]])
    places, columns = Places.of_marks(marks, 2, 3)
    assert places.places.tolist() == [[0, 1], [-1, -1], [2, -1]]
    assert places.rows.tolist() == [0, 0, 2]
    assert columns.tolist() == [0, 1, 2]
    x = torch.arange(3.0)[:, None] + 1.0
    assert places.spread(x).flatten().tolist() == [1.0, 1.0, 3.0]
    assert places.collect(places.spread(x)).flatten().tolist() == [2.0, 0.0, 3.0]


def test_spread_and_collect_have_each_other_as_gradient() -> None:
    places, _ = Places.of_marks(random_probs(0) > 0.0, CHOSEN, TOKENS * CHOSEN)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    y = torch.randn(TOKENS * CHOSEN, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(places.spread, x)
    assert torch.autograd.gradcheck(places.collect, y)


def test_outputs_and_gradients_are_those_of_a_loop_over_experts() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
    probs = random_probs(2).requires_grad_()

    def experts(rows: Tensor, counts: Tensor, row_probs: Tensor) -> tuple[Tensor, None]:
        parts = rows.split(counts.tolist())
        outputs = [part @ weight for part, weight in zip(parts, weights, strict=True)]
        return torch.cat(outputs) * row_probs[:, None], None

    found = _on_this_rank(x, probs, CHOSEN, TOKENS * CHOSEN, experts)
    expected = torch.einsum("te,th,ehk->tk", probs, x, weights)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, generator=generator)
    left = torch.autograd.grad(found, (x, probs), upstream)
    right = torch.autograd.grad(expected, (x, probs), upstream)
    torch.testing.assert_close(left[0], right[0])
    # Experts that were not chosen compute nothing, so their probability gets no gradient.
    torch.testing.assert_close(left[1], torch.where(probs > 0.0, right[1], 0.0))
