"""Random numbers depend on seed and step alone, and look uniform."""

import numpy as np

from slime.engines.embedded.seeds import child_seed, uniforms


def test_a_row_does_not_depend_on_the_batch() -> None:
    seeds = np.array([5, 6, 7], np.uint64)
    together = uniforms(seeds, np.array([0, 1, 2]))
    alone = [uniforms(seeds[i : i + 1], np.array([i]))[0] for i in range(3)]
    assert together.tolist() == alone


def test_known_number() -> None:
    # Worked out with Python integers from splitmix64's definition, mixed twice, step 0.
    mask = (1 << 64) - 1
    z = (42 + 0x9E3779B97F4A7C15) & mask
    for _ in range(2):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        z ^= z >> 31
    assert uniforms(np.array([42], np.uint64), np.array([0]))[0] == (z >> 11) / (1 << 53)


def test_neighbouring_seeds_and_steps_are_uniform_and_uncorrelated() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 200)
    steps = np.tile(np.arange(200), 200)
    drawn = uniforms(seeds, steps)
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    # 40000 draws: the mean's standard deviation is 0.0014.
    assert abs(drawn.mean() - 0.5) < 0.007
    square = drawn.reshape(200, 200)
    for left, right in ((square[:, 1:], square[:, :-1]), (square[1:], square[:-1])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.03


def test_children_of_a_seed_differ() -> None:
    assert len({child_seed(seed, i) for seed in (0, 1, -1) for i in range(100)}) == 300
