"""`--rm-type deepscaler`: the boxed answer after the thinking, which must be closed."""

import re
from typing import Any

from slime.data.sample import Sample
from slime.rollout.rm_hub.answers import last_boxed
from slime.rollout.rm_hub.base import label_of
from slime.rollout.rm_hub.math_utils import is_correct

_END_OF_THINKING = re.compile(r"</think>|###\s?Response")


async def reward(args: Any, sample: Sample) -> float:
    r"""1.0 if the last \boxed{} after `</think>` or `###Response` equals the label, else 0.0.

    0.0 as well if neither marker is there: a response cut off in its thinking earns nothing.
    """
    marks = list(_END_OF_THINKING.finditer(sample.response))
    answer = last_boxed(sample.response[marks[-1].end() :]) if marks else None
    return float(await is_correct(args, answer, label_of(args, sample)))
