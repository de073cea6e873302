"""Functions of a user by which weights come in the middle of each round, however fast either side is.

An optimizer step waits until the next round has an answer, so that others are under way. An answer
of that round is asked for again until new weights wrote it, or a part of it.
"""

import copy
import time
from pathlib import Path
from typing import Any

from slime.data.sample import Sample
from slime.rollout import sglang_rollout
from slime.rollout.state import GenerateState

DEADLINE_S = 300.0
FLAGS = (
    "--custom-generate-function-path support.weights_midway.generate "
    "--custom-megatron-before-train-step-hook-path support.weights_midway.wait_for_next_round "
)


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """An answer of round i with tokens by version i + 1, which comes beside the round."""
    rollout_id = GenerateState(args).rollout_id
    while True:
        answer = await sglang_rollout.generate(args, copy.deepcopy(sample), sampling_params)
        if answer.status is Sample.Status.ABORTED or _newest(answer) > rollout_id:
            return answer
        _mark(args, rollout_id).touch()


def wait_for_next_round(args: Any, rollout_id: int, *_: Any) -> None:
    """Return once the next round has an answer; at once in the last round."""
    mark, ends = _mark(args, rollout_id + 1), time.monotonic() + DEADLINE_S
    while rollout_id + 1 < args.num_rollout and not mark.exists():
        if time.monotonic() > ends:
            raise TimeoutError(f"round {rollout_id + 1} had no answer within {DEADLINE_S} s")
        time.sleep(0.01)


def _newest(sample: Sample) -> int:
    return int(sample.version_spans[-1][1])


def _mark(args: Any, rollout_id: int) -> Path:
    return Path(args.run_dir) / f"round-{rollout_id}-has-an-answer"
