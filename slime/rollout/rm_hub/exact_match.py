"""`--rm-type exact_match`: 1.0 if the answer is the label, character by character."""

from typing import Any

from slime.data.sample import Sample
from slime.rollout.rm_hub.answers import answer_part
from slime.rollout.rm_hub.base import label_of


async def reward(args: Any, sample: Sample) -> float:
    """1.0 or 0.0. Thinking, the end token and white space around the answer do not count."""
    return float(answer_part(sample.response) == str(label_of(args, sample)).strip())
