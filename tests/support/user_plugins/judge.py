"""Rewards: of a group at once, by dict, by a plain function, and with the built-in ones inside."""

import asyncio

from slime.rollout.rm_hub import async_rm


async def group_rm(args, samples, **kwargs):
    """The shortest right answer of the group wins."""
    await asyncio.sleep(0)
    right = [sample.label in sample.response for sample in samples]
    shortest = min(
        (s.response_length for s, ok in zip(samples, right, strict=True) if ok), default=0
    )
    return [
        float(ok and s.response_length == shortest) for s, ok in zip(samples, right, strict=True)
    ]


async def both(args, sample, **kwargs):
    if isinstance(sample, list):
        return await asyncio.gather(*(both(args, one) for one in sample))
    sample.metadata["rm_type"] = "f1"
    sample.custom_rm_path, path = None, args.custom_rm_path
    try:
        args.custom_rm_path = None
        score = await async_rm(args, sample)
    finally:
        args.custom_rm_path = path
    return {"score": score, "long": sample.response_length > 4}


def plain(args, sample, **kwargs):
    return len(sample.response) % 2
