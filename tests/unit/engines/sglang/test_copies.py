"""What load_weights did is repeated for later buckets, and only where it was copies."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.engines.sglang.copies import Copies, Layout
from slime.engines.sglang.invitation import parts, room_for


class FakeModel(torch.nn.Module):
    """Loads as SGLang's models do: a fused matrix, a cut of columns, padding, another dtype."""

    def __init__(self, adds: float = 0.0) -> None:
        super().__init__()
        self.fused = torch.nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16), False)
        self.columns = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16), False)
        self.padded = torch.nn.Parameter(torch.ones(5, 4, dtype=torch.bfloat16), False)
        self.wide = torch.nn.Parameter(torch.ones(4), False)
        self.calls = 0
        self._adds = adds

    def load_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        self.calls += 1
        for name, tensor in weights:
            if name == "gate":
                self.fused.data.narrow(0, 0, 3).copy_(tensor)
            elif name == "up":
                self.fused.data[3:].copy_(tensor)
            elif name == "down":
                self.columns.data.copy_(tensor.narrow(1, 2, 2))
            elif name == "embed":
                self.padded[:3].data.copy_(tensor)
                self.padded[3:].data.fill_(0)
            elif name == "norm":
                self.wide.data.copy_(tensor + self._adds if self._adds else tensor)


def bucket(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (3, 4), "up": (3, 4), "down": (3, 4), "embed": (3, 4), "norm": (4,)}
    return {
        name: torch.randn(*shape, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


def load(copies: Copies, model: FakeModel, content: dict[str, Tensor]) -> None:
    """As the receiver does."""
    sizes = [tensor.nbytes for tensor in content.values()]
    flat = torch.zeros(room_for(sizes), dtype=torch.uint8)
    for part, tensor in zip(parts(flat, sizes), content.values(), strict=True):
        part.copy_(tensor.view(-1).view(torch.uint8))
    tensors = [
        part.view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(parts(flat, sizes), content.values(), strict=True)
    ]
    layout = Layout(
        list(content), ["bfloat16"] * len(content), [list(t.shape) for t in content.values()]
    )
    copies.begin(model)
    copies.load(model, 0, layout, flat, tensors)
    flat.zero_()  # the trainer uses its buffer again


def assert_loaded(model: FakeModel, content: dict[str, Tensor], *, adds: float = 0.0) -> None:
    other = FakeModel(adds)
    other.load_weights(list(content.items()))
    for name, parameter in other.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_copies_are_repeated_without_load_weights() -> None:
    copies, model = Copies(), FakeModel()
    for seed in range(3):
        load(copies, model, bucket(seed))
        assert_loaded(model, bucket(seed))
    assert model.calls == 1


def test_padding_is_filled_again() -> None:
    copies, model = Copies(), FakeModel()
    load(copies, model, bucket(0))
    model.padded.data.fill_(7)
    load(copies, model, bucket(1))
    assert_loaded(model, bucket(1))


def test_a_model_that_computes_is_always_asked() -> None:
    copies, model = Copies(), FakeModel(adds=1.0)
    for seed in range(3):
        load(copies, model, bucket(seed))
        assert_loaded(model, bucket(seed), adds=1.0)
    assert model.calls == 3


def test_another_layout_is_recorded_anew() -> None:
    copies, model = Copies(), FakeModel()
    load(copies, model, bucket(0))
    fewer = {name: tensor for name, tensor in bucket(1).items() if name != "up"}
    load(copies, model, fewer)
    load(copies, model, bucket(2))
    assert_loaded(model, bucket(2))
    assert model.calls == 3


def test_parameters_that_moved_are_not_written_at_their_old_place() -> None:
    copies, model = Copies(), FakeModel()
    load(copies, model, bucket(0))
    model.wide.data = torch.zeros(4)
    load(copies, model, bucket(1))
    assert_loaded(model, bucket(1))
    assert model.calls == 2


def test_copies_that_miss_something_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plan: Any = __import__("slime.engines.sglang.copies", fromlist=["_Plan"])._Plan
    run = plan.run

    def run_short(self: Any, flat: Tensor) -> None:
        self._others = self._others[1:]
        run(self, flat)

    monkeypatch.setattr(plan, "run", run_short)
    copies, model = Copies(), FakeModel()
    for seed in range(2):
        load(copies, model, bucket(seed))
        assert_loaded(model, bucket(seed))
    assert model.calls == 3  # recorded, loaded again, and the second
