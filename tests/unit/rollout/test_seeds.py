from hypothesis import given
from hypothesis import strategies as st

from slime.rollout.seeds import sampling_seed


def test_samples_and_rounds_have_seeds_of_their_own():
    seeds = {sampling_seed(42, rollout, index) for rollout in range(50) for index in range(200)}
    # 10,000 draws out of 2**31: about 0.02 collisions are expected.
    assert len(seeds) >= 9_999


def test_seed_is_the_same_in_every_process():
    assert sampling_seed(42, 0, 0) == 922454984
    assert sampling_seed(42, "eval/aime", 3) == 276316695


def test_run_seed_stream_and_position_change_the_seed():
    base = sampling_seed(1, 2, 3)
    others = {sampling_seed(2, 2, 3), sampling_seed(1, "2x", 3), sampling_seed(1, 2, 3, 4)}
    assert base not in others
    assert len(others) == 3


@given(st.integers(), st.one_of(st.integers(), st.text("ab/")), st.integers(0), st.integers(0))
def test_seed_fits_31_bits(seed: int, stream: int | str, index: int, position: int):
    assert 0 <= sampling_seed(seed, stream, index, position) < 2**31
