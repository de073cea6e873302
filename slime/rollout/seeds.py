"""Sampling seeds: one per sample, round and starting position, the same whenever asked again."""

from hashlib import blake2b


def sampling_seed(rollout_seed: int, stream: int | str, index: int, position: int = 0) -> int:
    """A seed in [0, 2**31), stable over processes, Python versions and machines.

    The group members of a prompt and the rounds of a run must not share random numbers, and a
    request that is sent again must. So the seed depends on who asks, not on when.

    Args:
        rollout_seed: `--rollout-seed`.
        stream: number of the round; in evaluation the name of the dataset, so that each evaluation
            of a run meets the same luck.
        index: `Sample.index`.
        position: response tokens the sample already has: a resumed sample continues with fresh
            numbers instead of repeating those of its beginning.
    """
    key = f"{rollout_seed}/{stream}/{index}/{position}".encode()
    return int.from_bytes(blake2b(key, digest_size=4).digest()) & 0x7FFF_FFFF


def continued_seed(seed: int, written: int) -> int:
    """A seed for the rest of an answer whose first `written` tokens were drawn with `seed`."""
    digest = blake2b(f"{seed}/{written}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) & 0x7FFF_FFFF
