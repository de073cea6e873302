"""`--rm-type random`: a coin flip, to see what a run does without a signal."""

import random
from typing import Any

from slime.data.sample import Sample


async def reward(args: Any, sample: Sample) -> float:
    """0.0 or 1.0; the same for the same `rollout_seed` and `sample.index`."""
    return float(random.Random(f"{args.rollout_seed}:{sample.index}").randint(0, 1))
