import pytest

from slime.rollout.rm_hub.answers import answer_part, final_answer, last_boxed


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{1}", "1"),
        (r"first \boxed{1}, no: \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\fbox{4}", "4"),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{\text{a {b} c}}", r"\text{a {b} c}"),
        ("none", None),
    ],
)
def test_the_last_box_counts(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("response", "part"),
    [
        ("  5 \n", "5"),
        ("<think>3 or 4</think>5<|im_end|>", "5"),
        ("3 or 4</think>5", "5"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>never closed: 5", ""),
        ("5<\uff5cend\u2581of\u2581sentence\uff5c>", "5"),
        ("5<|im_end|>\n<|endoftext|>\n", "5"),
        ("5</s>", "5"),
        ("a < b |> c", "a < b |> c"),
    ],
)
def test_thinking_and_end_tokens_are_no_answer(response: str, part: str) -> None:
    assert answer_part(response) == part


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so 3, no \boxed{4}. Answer: 5", "4"),
        ("8 * 2 = 16\n#### 18", "18"),
        ("The answer is 12.", "12"),
        ("Final Answer: $x^2$", "x^2"),
        ("**Answer:** 7", "7"),
        ("First 3.\nThe sum is 1,234.", "1,234"),
        ("70 apples and 80", "80"),
        (r"we get \(\frac{3}{4}\) in the end", r"\frac{3}{4}"),
        (r"3\sqrt{2}", r"3\sqrt{2}"),
        ("<think>42", None),
        (r"\boxed{}", None),
        ("", None),
        ("blue", "blue"),
    ],
)
def test_the_final_answer_of_a_response(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer
