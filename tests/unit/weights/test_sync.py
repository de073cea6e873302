import pytest
import torch

from slime.engines.checksum import checksum
from slime.errors import WeightSyncError
from slime.weights.buckets import mark_last
from slime.weights.sync import verify_sums
from slime.weights.transport import Bucket


def make_bucket() -> Bucket:
    tensors = (torch.arange(6.0), torch.ones(2, 3))
    return Bucket(("a.weight", "b.weight"), tensors, 48)


def test_equal_checksums_pass():
    bucket = make_bucket()
    sums = {
        name: checksum(tensor) for name, tensor in zip(bucket.names, bucket.tensors, strict=True)
    }
    verify_sums(sums, [sums, dict(sums)], ["http://e0", "http://e1"])


def test_one_changed_value_on_one_engine_is_named():
    bucket = make_bucket()
    sums = {
        name: checksum(tensor) for name, tensor in zip(bucket.names, bucket.tensors, strict=True)
    }
    wrong = bucket.tensors[1].clone()
    wrong[0, 0] = torch.nextafter(wrong[0, 0], torch.tensor(2.0))
    with pytest.raises(WeightSyncError, match=r"http://e1.*b\.weight"):
        verify_sums(sums, [sums, sums | {"b.weight": checksum(wrong)}], ["http://e0", "http://e1"])


def test_a_tensor_the_engine_never_loaded_is_named():
    bucket = make_bucket()
    with pytest.raises(WeightSyncError, match=r"a\.weight is missing"):
        verify_sums(dict.fromkeys(bucket.names, 1), [{}], ["http://e0"])


def test_the_last_of_several_items_is_marked_and_a_lone_one_too():
    assert list(mark_last("abc")) == [("a", False), ("b", False), ("c", True)]
    assert list(mark_last("a")) == [("a", True)]
    assert list(mark_last("")) == []
