"""A reward that waits while a file is there, so that a test can hold a round."""

import asyncio
from pathlib import Path
from typing import Any

from slime.data.sample import Sample

HOLD = "hold-rewards"


async def reward(args: Any, sample: Sample) -> float:
    """How many tokens were written."""
    # The test is another process: a file is all they have in common.
    while (Path(args.run_dir).parent / HOLD).exists():  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    return float(sample.response_length)
