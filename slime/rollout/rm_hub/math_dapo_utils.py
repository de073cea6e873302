"""`--rm-type dapo`: +1 or -1 for "Answer: ..." near the end of the response."""

import re
from typing import Any

from slime.data.sample import Sample
from slime.rollout.rm_hub.answers import answer_part, last_boxed
from slime.rollout.rm_hub.base import label_of
from slime.rollout.rm_hub.math_utils import is_correct

INVALID = "[INVALID]"
_TAIL_CHARACTERS = 300
_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)


async def reward(args: Any, sample: Sample) -> dict[str, Any]:
    """{"score": 1.0 or -1.0, "acc": right or not, "pred": the answer found}; --reward-key score.

    Only the last 300 characters are searched, for the last "Answer: ...".

    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, §2.4 (rule-based reward of +1 and -1).
    """
    answer = extract(sample.response)
    right = await is_correct(args, answer, label_of(args, sample))
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": answer or INVALID}


def extract(response: str) -> str | None:
    """The last answer in the last 300 characters, out of its box; None if there is none."""
    found = _ANSWER.findall(answer_part(response)[-_TAIL_CHARACTERS:])
    if not found:
        return None
    answer = found[-1].strip().strip("*").strip()
    boxed = last_boxed(answer)
    return boxed if boxed is not None else answer or None
