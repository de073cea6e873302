"""`--rm-type reasoning_gym`: the score of a task's own verifier, from the package of that name.

Source: Reasoning Gym, https://github.com/open-thought/reasoning-gym (Apache-2.0).
"""

import importlib.util
import re
from typing import Any

from slime.data.sample import Sample
from slime.errors import ConfigError, DeadlineExceeded
from slime.rollout.rm_hub.answers import answer_part, last_boxed
from slime.rollout.rm_hub.base import BadReward, label_of
from slime.rollout.rm_hub.worker_pool import script_pool

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# What nobody would take for an answer; a task that pays for it pays for anything.
GARBAGE = "xx"


async def reward(args: Any, sample: Sample) -> float:
    r"""The score in [0, 1]; one below `reasoning_gym_min_score` is 0.0.

    A row is an entry of a data set: its `question` as prompt, `answer` as label, `metadata` as metadata
    (which has `source_dataset`). The answer is in the last <answer></answer>, else in the last \boxed{},
    else all that follows the thinking. One that takes longer than `reward_timeout_s` to check, or that
    the verifier raises on, is 0.0.

    Raises:
        ConfigError: the package is not installed.
        BadReward: there is no such task, or it gives the answer "xx" just as much
            ("pays_for_garbage"): then a score says nothing.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError("--rm-type reasoning_gym: pip install reasoning-gym")
    task = sample.metadata.get("source_dataset")
    if not task:
        raise BadReward(
            "missing_label", "metadata has no source_dataset; set --metadata-key metadata"
        )
    entry = {
        "question": sample.metadata.get("question", sample.prompt),
        "answer": label_of(args, sample),
        "metadata": sample.metadata,
    }
    answer = answer_in(sample.response)
    if not answer:
        return 0.0
    request = {"task": task, "answer": answer, "entry": entry, "garbage": GARBAGE}
    pool = script_pool("gym_worker.py", args.reward_workers)
    try:
        told = await pool.ask(request, deadline_s=args.reward_timeout_s)
    except DeadlineExceeded:
        return 0.0
    if "error" in told:
        raise BadReward("bad_label", f"reasoning_gym: {told['error']}")
    if told["garbage_score"] >= max(args.reasoning_gym_min_score, 1e-9):
        raise BadReward(
            "pays_for_garbage", f"{task} gives {told['garbage_score']:g} for {GARBAGE!r}"
        )
    return told["score"] if told["score"] >= args.reasoning_gym_min_score else 0.0


def answer_in(response: str) -> str:
    """The answer a response commits to; "" if there is none."""
    text = answer_part(response)
    tagged = _ANSWER.findall(text)
    if tagged:
        return tagged[-1].strip()
    boxed = last_boxed(text)
    return text if boxed is None else boxed
