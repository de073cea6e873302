from types import SimpleNamespace
from typing import Any

import pytest

from slime.data.sample import Sample
from slime.rollout.rm_hub import gpqa
from slime.rollout.rm_hub.base import BadReward

ARGS = SimpleNamespace(label_key="label")
CHOICES = ["3 m/s", "4 m/s", "A particle", "none of these"]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"so \boxed{C}", "C"),
        (r"\boxed{A} no, \boxed{(b)}", "B"),
        (r"\boxed{\text{D}}", "D"),
        (r"\boxed{3 m/s}", "A"),
        ("The answer is (C).", "C"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("Final answer is $\\mathbf{b}$", None),
        ("answer: C) 3 m/s", "C"),
        ("The correct choice is: D. because A is wrong", "D"),
        ("Answer: A\nNo. Answer: B<|im_end|>", "B"),
        ("<think>Answer: A</think>\nC", "C"),
        ("<think>Answer: A", None),
        ("reasons\n\n(D)", "D"),
        ("D is wrong, so it must be something else", None),
        ("Answer: A or B", None),
        ("Answer: A, B, C, D", None),
        (r"\boxed{A, B}", None),
        (r"\boxed{A/B}", None),
        (r"\boxed{A and B}", None),
        ("Answer: A particle in a box", None),
        ("The answer is a particle", None),
        ("Answer: Certainly not", None),
        ("ABCD", None),
        ("", None),
    ],
)
def test_the_letter_a_response_commits_to(response: str, letter: str | None) -> None:
    assert gpqa.chosen_letter(response, CHOICES) == letter


@pytest.mark.parametrize("label", ["C", "(c)", 2, "2", "A particle"])
async def test_a_label_is_a_letter_a_number_or_a_choice(label: Any) -> None:
    for response, score in [("Answer: C", 1.0), ("Answer: B", 0.0), ("Answer: A, B, C", 0.0)]:
        sample = Sample(response=response, label=label, metadata={"choices": CHOICES})
        assert await gpqa.reward(ARGS, sample) == score


async def test_a_label_that_is_no_choice_is_refused() -> None:
    with pytest.raises(BadReward, match="'5 m/s'"):
        await gpqa.reward(ARGS, Sample(response="A", label="5 m/s", metadata={"choices": CHOICES}))
