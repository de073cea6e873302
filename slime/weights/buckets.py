"""Tensors packed into buckets of at most N bytes."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from slime.weights.transport import Bucket


def make_buckets(named: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Buckets in the order of `named`; a tensor larger than `bucket_bytes` travels alone.

    Args:
        named: (name, tensor) pairs; consumed lazily, so that at most one bucket is held.
        bucket_bytes: `--update-weight-buffer-size`.
    """
    names: list[str] = []
    tensors: list[Tensor] = []
    size = 0
    for name, tensor in named:
        num_bytes = tensor.nbytes
        if names and size + num_bytes > bucket_bytes:
            yield Bucket(tuple(names), tuple(tensors), size)
            names, tensors, size = [], [], 0
        names.append(name)
        tensors.append(tensor)
        size += num_bytes
    if names:
        yield Bucket(tuple(names), tuple(tensors), size)


def mark_last[T](items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last; an item is held until the next one is made."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True
