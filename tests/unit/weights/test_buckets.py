import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.weights.buckets import make_buckets


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(4, 200))
def test_each_tensor_travels_once_in_order_and_no_bucket_of_several_exceeds_its_size(sizes, limit):
    named = [(f"p{i}", torch.zeros(size)) for i, size in enumerate(sizes)]
    buckets = list(make_buckets(named, limit))
    assert [name for bucket in buckets for name in bucket.names] == [name for name, _ in named]
    for bucket in buckets:
        assert bucket.num_bytes == sum(4 * t.numel() for t in bucket.tensors)
        assert len(bucket.names) == 1 or bucket.num_bytes <= limit


def test_buckets_are_made_lazily():
    taken = []

    def weights():
        for i in range(4):
            taken.append(i)
            yield f"p{i}", torch.zeros(10)

    next(make_buckets(weights(), 40))
    assert taken == [0, 1]
