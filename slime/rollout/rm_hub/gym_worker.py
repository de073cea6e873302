"""The process behind `gym_reward`: scores answers with the package, one JSON object per line.

{"task", "answer", "entry", "garbage"} in, {"score", "garbage_score"} or {"error"} out; {"ready": true}
comes first. Runs as a script, outside the package; what a scorer raises on an answer is a score of 0.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from typing import Any

_MEMORY_BYTES = 4 << 30


def _score(function: Any, answer: Any, entry: dict[str, Any]) -> float:
    try:
        return float(function(answer=answer, entry=entry))
    except Exception:  # noqa: BLE001 - scorers raise on answers that they cannot read
        return 0.0


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import reasoning_gym  # pyright: ignore[reportMissingImports] - an extra

    try:
        function: Any = reasoning_gym.get_score_answer_fn(request["task"])
    except ValueError as error:
        return {"error": str(error)}
    entry = request["entry"]
    return {
        "score": _score(function, request["answer"], entry),
        "garbage_score": _score(function, request["garbage"], entry),
    }


def main() -> None:
    """Answer requests until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    # Answers go to the true stdout; what a library prints must not mix with them.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # It takes seconds, so before the first request.
    import reasoning_gym  # noqa: F401  # pyright: ignore[reportMissingImports]

    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
