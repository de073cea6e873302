"""`--rm-type dapo`: +1 or -1 for "Answer: ..." near the end of the response."""

import re
from typing import Any

from slime.data.sample import Sample
from slime.rollout.rm_hub.answers import answer_part, last_boxed
from slime.rollout.rm_hub.base import label_of
from slime.rollout.rm_hub.math_utils import is_correct, is_correct_now

INVALID = "[INVALID]"
_TAIL_CHARACTERS = 300
_BOX_TAIL_CHARACTERS = 100
_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)


async def reward(args: Any, sample: Sample) -> dict[str, Any]:
    """{"score": 1.0 or -1.0, "acc": right or not, "pred": the answer found}; --reward-key score.

    Only the last 300 characters are searched, for the last "Answer: ...".

    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, §2.4 (rule-based reward of +1 and -1).
    """
    answer = extract(sample.response)
    return _scores(answer, await is_correct(args, answer, label_of(args, sample)))


def compute_score(
    solution_str: str, ground_truth: str, strict_box_verify: bool = False
) -> dict[str, Any]:
    r"""As `reward`, for functions of users: plain text in, and it may block (5 seconds at most).

    Args:
        strict_box_verify: the answer is the last \boxed{} in the last 100 characters, not "Answer: ...".
    """
    if strict_box_verify:
        answer = last_boxed(answer_part(solution_str)[-_BOX_TAIL_CHARACTERS:]) or None
    else:
        answer = extract(solution_str)
    return _scores(answer, is_correct_now(answer, ground_truth))


def _scores(answer: str | None, is_right: bool) -> dict[str, Any]:
    return {"score": 1.0 if is_right else -1.0, "acc": is_right, "pred": answer or INVALID}


def extract(response: str) -> str | None:
    """The last answer in the last 300 characters, out of its box; None if there is none."""
    found = _ANSWER.findall(answer_part(response)[-_TAIL_CHARACTERS:])
    if not found:
        return None
    answer = found[-1].strip().strip("*").strip()
    boxed = last_boxed(answer)
    return boxed if boxed is not None else answer or None
