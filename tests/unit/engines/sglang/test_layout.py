"""A bucket's layout: the same on both sides, and every tensor at a place where its dtype may be."""

import torch

from slime.engines.sglang.layout import Layout

SHAPES = [((3, 5), torch.float32)] * 3 + [
    ((7,), torch.uint8),
    ((), torch.float64),
    ((0, 4), torch.int8),
]
SHAPES += [((8, 8), torch.float32)] * 2 + [((16, 8), torch.bfloat16), ((5,), torch.bfloat16)]


def make() -> tuple[Layout, list[torch.Tensor]]:
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in SHAPES]
    return Layout.of(tuple(f"w{i}" for i in range(len(tensors))), tensors), tensors


def test_it_is_read_as_it_was_told() -> None:
    layout, _ = make()
    again = Layout.read(layout.text())
    assert again == layout
    assert hash(again) == hash(layout)
    assert again.num_bytes == layout.num_bytes


def test_what_is_put_into_strips_is_found_in_tensors() -> None:
    layout, tensors = make()
    for counts in (None, [1] * len(tensors), [2, 1, 1, 1, 1, 3, 1]):
        flat = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        rows = [row for strip in layout.strips(flat, counts) for row in strip]
        for number, row in enumerate(rows):
            row.fill_(number)
        for number, (view, tensor) in enumerate(zip(layout.tensors(flat), tensors, strict=True)):
            assert (view.shape, view.dtype) == (tensor.shape, tensor.dtype)
            assert set(view.reshape(-1).view(torch.uint8).tolist()) <= {number}
            assert view.data_ptr() % 64 == flat.data_ptr() % 64 or not view.numel()


def test_tensors_of_one_size_are_a_strip() -> None:
    layout, _ = make()
    strips = layout.strips(torch.zeros(layout.num_bytes, dtype=torch.uint8))
    # Shapes and dtypes do not matter, bytes do.
    assert [tuple(strip.shape) for strip in strips] == [
        (3, 60),
        (1, 7),
        (1, 8),
        (1, 0),
        (3, 256),
        (1, 10),
    ]
