from types import SimpleNamespace
from typing import Any

import pytest

from slime.data.sample import Sample
from slime.errors import ConfigError
from slime.rollout.rm_hub import (
    deepscaler,
    exact_match,
    f1,
    math_dapo_utils,
    random_reward,
)
from slime.rollout.rm_hub.base import BadReward

ARGS = SimpleNamespace(reward_workers=1, reward_timeout_s=60.0, label_key="label", rollout_seed=42)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("c", 1.0),
        ("<think>abcde</think>c<|im_end|>", 1.0),
        ("<think>abcde</think>\nc\n", 1.0),
        ("C", 0.0),
        ("cc", 0.0),
        ("<think>c", 0.0),
        ("", 0.0),
    ],
)
async def test_exact_match(response: str, expected: float) -> None:
    assert await exact_match.reward(ARGS, Sample(response=response, label="c")) == expected


async def test_exact_match_compares_numbers_as_text() -> None:
    label: Any = 7
    assert await exact_match.reward(ARGS, Sample(response="7", label=label)) == 1.0


@pytest.mark.parametrize(
    ("answer", "label", "score"),
    [
        ("The cat sat.", "a cat sat", 1.0),
        ("cat cat dog", "cat bird", 2 * 1 / 5),
        ("dog", "cat", 0.0),
        ("", "", 1.0),
        ("", "cat", 0.0),
    ],
)
def test_f1_of_words(answer: str, label: str, score: float) -> None:
    assert f1.f1_score(answer, label) == pytest.approx(score)


async def test_f1_takes_the_best_of_several_labels() -> None:
    label: Any = ["dog", "white cat"]
    assert await f1.reward(ARGS, Sample(response="cat", label=label)) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"thinking</think>so \boxed{4}", 1.0),
        (r"thinking ###Response \boxed{4}", 1.0),
        (r"\boxed{4}", 0.0),
        (r"\boxed{4}</think> no box", 0.0),
        (r"a</think>\boxed{5}</think>\boxed{4}", 1.0),
        (r"a</think>\boxed{5}", 0.0),
    ],
)
async def test_deepscaler_wants_the_thinking_closed(response: str, expected: float) -> None:
    assert await deepscaler.reward(ARGS, Sample(response=response, label="4")) == expected


@pytest.mark.parametrize(
    ("response", "score", "pred"),
    [
        ("so\nAnswer: 34", 1.0, "34"),
        ("Answer: 1\nAnswer: $34$<|im_end|>", 1.0, "$34$"),
        (r"Answer: \boxed{34}", 1.0, "34"),
        ("Answer: 35", -1.0, "35"),
        ("34", -1.0, math_dapo_utils.INVALID),
        ("Answer: 34" + "." * 300, -1.0, math_dapo_utils.INVALID),
    ],
)
async def test_dapo_scores_plus_or_minus_one(response: str, score: float, pred: str) -> None:
    result = await math_dapo_utils.reward(ARGS, Sample(response=response, label="34"))
    assert result == {"score": score, "acc": score > 0, "pred": pred}


async def test_random_reward_is_a_fixed_coin_per_sample() -> None:
    flips = [await random_reward.reward(ARGS, Sample(index=i)) for i in range(200)]
    assert flips == [await random_reward.reward(ARGS, Sample(index=i)) for i in range(200)]
    assert set(flips) == {0.0, 1.0}
    assert 60 < sum(flips) < 140


async def test_a_missing_label_is_told_apart_from_a_missing_flag() -> None:
    with pytest.raises(BadReward, match="sample 3 has no label"):
        await exact_match.reward(ARGS, Sample(index=3))
    with pytest.raises(ConfigError, match="--label-key"):
        await f1.reward(SimpleNamespace(label_key=None), Sample(index=3))


@pytest.mark.parametrize(
    ("text", "truth", "strict", "score", "pred"),
    [
        ("so\nAnswer: 34", "34", False, 1.0, "34"),
        (r"Answer: \boxed{\frac{1}{2}}", "0.5", False, 1.0, r"\frac{1}{2}"),
        ("Answer: 34 Answer: 35", "34", False, -1.0, "34 Answer: 35"),
        ("Answer: 34" + " " * 400 + "x", "34", False, -1.0, "[INVALID]"),
        ("<think>Answer: 34", "34", False, -1.0, "[INVALID]"),
        (r"it is \boxed{34}", "34", True, 1.0, "34"),
        (r"it is \boxed{34}" + "." * 100, "34", True, -1.0, "[INVALID]"),
        ("Answer: 34", "34", True, -1.0, "[INVALID]"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", True, 1.0, "(x+1)^2"),
        (r"\boxed{9^{9^{9^{9}}}}", "x", True, -1.0, "9^{9^{9^{9}}}"),
    ],
)
def test_the_door_for_functions_of_users(
    text: str, truth: str, strict: bool, score: float, pred: str
) -> None:
    told = math_dapo_utils.compute_score(text, truth, strict_box_verify=strict)
    assert told == {"score": score, "acc": score > 0, "pred": pred}
