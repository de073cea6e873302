"""The process behind `math_utils`: reads pairs of formulas, writes whether they are equal.

Runs as a script, outside the package: it must start fast and must not import torch. One JSON object
per line, {"answer", "label", "limit_s"} in, {"equal"} out; {"ready": true} comes first.
"""

import contextlib
import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

_MEMORY_BYTES = 2 << 30


def _is_equal(answer: str, label: str, limit_s: int) -> bool:
    from math_verify import verify

    gold, given = _parse_label(label, limit_s), _parse(answer, limit_s)
    return bool(gold and given and verify(gold, given, timeout_seconds=limit_s))


def _parse(text: str, limit_s: int) -> list[Any]:
    from math_verify import parse

    # Inside \boxed{} math-verify reads all of it; in plain text it would take "3\sqrt{2}" for 3.
    return parse(rf"\boxed{{{text}}}", parsing_timeout=limit_s)


@lru_cache(maxsize=1024)
def _parse_label(label: str, limit_s: int) -> list[Any]:
    return _parse(label, limit_s)  # a whole group asks for the same one


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    limit_s = float(request["limit_s"])
    # An integer like 9^9^9 is computed in C, where SIGALRM waits. Should the parent have died, no
    # one would end it, so the default action of SIGPROF does, after so much processor time.
    signal.setitimer(signal.ITIMER_PROF, 2 * limit_s + 1)
    try:
        soft_limit_s = max(1, int(limit_s / 2))  # math-verify counts whole seconds
        return {"equal": _is_equal(request["answer"], request["label"], soft_limit_s)}
    except Exception as error:  # noqa: BLE001 - the parent logs it
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answer requests until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    logging.disable(logging.ERROR)
    # Answers go to the true stdout; what a library prints must not mix with them.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _is_equal("x^2+1", r"\frac{1}{2}", 10)  # the first parse builds tables for half a second
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
