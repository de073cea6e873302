"""`--rm-type f1`: overlap of the words of answer and label."""

import re
import string
from collections import Counter
from typing import Any, cast

from slime.data.sample import Sample
from slime.rollout.rm_hub.answers import answer_part
from slime.rollout.rm_hub.base import label_of

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


async def reward(args: Any, sample: Sample) -> float:
    """F1 in [0, 1] of the words; with a list of labels the best of them.

    Source: Rajpurkar et al. 2016 (SQuAD), arXiv:1606.05250, §6.1.
    """
    label = label_of(args, sample)
    labels = cast(list[Any], label) if isinstance(label, list) else [label]
    answer = answer_part(sample.response)
    return max((f1_score(answer, str(item)) for item in labels), default=0.0)


def f1_score(answer: str, label: str) -> float:
    """Harmonic mean of precision and recall over words; 1.0 for two empty texts."""
    given, wanted = Counter(_words(answer)), Counter(_words(label))
    if not given or not wanted:
        return float(given == wanted)
    common = (given & wanted).total()
    return 2 * common / (given.total() + wanted.total())


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
