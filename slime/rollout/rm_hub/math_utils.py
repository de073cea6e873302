"""`--rm-type math`: 1.0 if the response's final answer equals the label as mathematics.

Text and plain numbers are compared here; only formulas go to math-verify, in processes of their
own: it is not made for threads, and what a model writes (9^9^9) can hang it.

Source: math-verify, https://github.com/huggingface/Math-Verify (Apache-2.0).
"""

import logging
import re
from collections.abc import Generator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from slime.data.sample import Sample
from slime.errors import DeadlineExceeded, RewardError
from slime.rollout.rm_hub.answers import final_answer, last_boxed
from slime.rollout.rm_hub.base import label_of
from slime.rollout.rm_hub.worker_pool import WorkerPool, script_pool

logger = logging.getLogger(__name__)

# No honest comparison takes longer; reward_timeout_s counts too if it is shorter.
MAX_DEADLINE_S = 5.0
_MAX_CHARACTERS = 1000
_DECIMALS = 6

_NOISE = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;!:]|\\ |[\s$]")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?\d+)\}\{(\d+)\}")
_PLAIN = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")
_WORDS = re.compile(r"[A-Za-z]+")
# Towers of numbers, large powers and factorials: no answer worth a worker's life.
_HUGE = re.compile(r"(?:\^\{?\d+){3}|\^\{?\d+\^\{?\d{2}|\^\{?\d{4}|\d{4}!")


async def reward(args: Any, sample: Sample) -> float:
    """1.0 or 0.0; see `slime.rollout.rm_hub.answers.final_answer` for what counts as the answer."""
    return float(await is_correct(args, final_answer(sample.response), label_of(args, sample)))


async def is_correct(args: Any, answer: str | None, label: Any) -> bool:
    r"""Whether `answer` equals the label; labels may be numbers, \boxed{}, or end in "#### 18".

    Args:
        args: flat namespace with reward_workers, reward_timeout_s.
    """
    reference = reference_answer(label)
    if answer is None:
        return False
    quick = quick_equal(answer, reference)
    if quick is not None:
        return quick
    deadline_s = min(args.reward_timeout_s, MAX_DEADLINE_S)
    with _counted_as_wrong(answer, label):
        asked = _pool(args.reward_workers).ask(_request(answer, reference), deadline_s=deadline_s)
        return bool((await asked).get("equal"))
    return False


def is_correct_now(answer: str | None, label: Any) -> bool:
    """As `is_correct`, without an event loop: it blocks, up to 5 seconds for a formula."""
    reference = reference_answer(label)
    if answer is None:
        return False
    quick = quick_equal(answer, reference)
    if quick is not None:
        return quick
    with _counted_as_wrong(answer, label):
        result = _pool(1).ask_now(_request(answer, reference), deadline_s=MAX_DEADLINE_S)
        return bool(result.get("equal"))
    return False


def _request(answer: str, reference: str) -> dict[str, Any]:
    return {"answer": answer, "label": reference, "limit_s": MAX_DEADLINE_S}


def _pool(num_workers: int) -> WorkerPool:
    return script_pool("math_worker.py", num_workers)


@contextmanager
def _counted_as_wrong(answer: str, label: Any) -> Generator[None]:
    try:
        yield
    except (DeadlineExceeded, RewardError) as error:
        logger.warning("counted as wrong: %.80r for the label %.80r (%s)", answer, label, error)


def reference_answer(label: Any) -> str:
    r"""The answer in a label: of a \boxed{} its content, of a worked solution what follows ####."""
    text = str(label)
    boxed = last_boxed(text)
    return (text.rpartition("####")[2] if boxed is None else boxed).strip()


def quick_equal(answer: str, reference: str) -> bool | None:
    """Equality where it can be decided without computer algebra; None where it cannot."""
    answer, reference = normalize(answer), normalize(reference)
    if answer == reference:
        return True
    numbers = as_fraction(answer), as_fraction(reference)
    if numbers[0] is not None and numbers[1] is not None:
        return abs(numbers[0] - numbers[1]) < Fraction(1, 2 * 10**_DECIMALS)
    # Letters multiply in algebra: "no" would equal "on".
    if _WORDS.fullmatch(reference) and len(reference) > 1:
        return answer.lower() == reference.lower()
    if not answer or len(answer) > _MAX_CHARACTERS or _HUGE.search(answer):
        return False
    return None


def normalize(text: str) -> str:
    """`text` without spaces, dollar signs, LaTeX spacing, units of style, thousands commas."""
    text = _TEXT.sub(r"\1", text.strip())
    text = _NOISE.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))(?<![({\[]\d,)", "", text)
    return text.removesuffix(".")


def as_fraction(text: str) -> Fraction | None:
    """The exact value of a normalised integer, decimal or simple fraction; else None."""
    if match := _FRACTION.fullmatch(text):
        text = f"{match[1]}{match[2]}/{match[3]}".replace("--", "").replace("+-", "-")
    if not _PLAIN.fullmatch(text) or len(text) > _MAX_CHARACTERS:
        return None
    numerator, _, denominator = text.partition("/")
    if denominator and not int(denominator):
        return None
    return Fraction(numerator) / int(denominator or 1)
