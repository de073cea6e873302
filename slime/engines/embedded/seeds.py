"""Counter-based random numbers: a token's randomness depends on its request's seed and its place
only."""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def child_seed(seed: int, index: int) -> int:
    """Seed of answer `index` of a request for several answers; 63 bits, so that JSON readers
    agree."""
    words = np.array([(seed + _GOLDEN * (index + 1)) & _MASK64], dtype=np.uint64)
    return int(_mix(_mix(words))[0] >> np.uint64(1))


def uniforms(seeds: NDArray[np.uint64], steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """[B] numbers in [0, 1), one per row, from (seed, step) alone.

    Args:
        seeds: [B] of each row's request.
        steps: [B] tokens each request has generated so far.

    Source: splitmix64 of Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195; mixed twice,
    because seeds and steps are small neighbouring numbers.
    """
    words = seeds + np.uint64(_GOLDEN) * (steps.astype(np.uint64) + np.uint64(1))
    return (_mix(_mix(words)) >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
