"""What load_weights did is repeated for later buckets, and only where it was copies."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.engines.sglang.copies import Copies
from slime.engines.sglang.layout import Layout


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


def load(copies: Copies, model: Any, content: dict[str, Tensor]) -> None:
    """As the receiver does."""
    layout = Layout.of(tuple(content), list(content.values()))
    flat = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for part, tensor in zip(layout.tensors(flat), content.values(), strict=True):
        part.copy_(tensor)
    copies.begin(model)
    copies.load(model, 0, layout, flat)
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


class FakeExperts(torch.nn.Module):
    """Rank 1 of 2 of a layer as SGLang has it: gate and up of an expert in one matrix, columns of down."""

    def __init__(self, num_experts: int, backwards: bool = False) -> None:
        super().__init__()
        self.w13 = torch.nn.Parameter(torch.zeros(num_experts, 8, 6), False)
        self.w2 = torch.nn.Parameter(torch.zeros(num_experts, 6, 4), False)
        self.bias = torch.nn.Parameter(torch.zeros(num_experts, 3, 6), False)
        self.calls = 0
        self._order = -1 if backwards else 1

    def load_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        self.calls += 1
        for name, tensor in weights[:: self._order]:
            kind, number = name.split(".")
            expert = int(number)
            if kind == "down":
                self.w2.data[expert].copy_(tensor.narrow(1, 4, 4))
            elif kind == "bias":
                self.bias.data[expert].copy_(tensor)  # one row for three
            else:
                half = self.w13.data[expert].narrow(0, 0 if kind == "gate" else 4, 4)
                half.copy_(tensor.narrow(0, 4, 4))


def experts(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (8, 6), "up": (8, 6), "down": (6, 8), "bias": (6,)}
    names = [f"{kind}.{i}" for i in range(count) for kind in ("gate", "up")]
    names += [f"{kind}.{i}" for kind in ("down", "bias") for i in range(count)]
    return {name: torch.randn(*shapes[name.split(".")[0]], generator=generator) for name in names}


@pytest.mark.parametrize("backwards", [False, True])
def test_experts_of_a_layer_are_a_few_copies(backwards: bool) -> None:
    copies, model = Copies(), FakeExperts(16, backwards)
    for seed in range(3):
        load(copies, model, experts(16, seed))
        other = FakeExperts(16)
        other.load_weights(list(experts(16, seed).items()))
        for name, parameter in other.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name
    assert model.calls == 1
    (plan,) = [plan for _, plan in copies._plans.values()]
    assert plan is not None
    num_copies = len(plan._plain) + len(plan._others)
    others = plan._others if not backwards else []
    assert {copy.dtype for copy in others if copy.target.dim() > 2} <= {torch.int64}
    # Rows that are repeated stay 16 copies; in the other order so do all.
    assert num_copies == (64 if backwards else 2 + 16)


def test_a_bucket_that_has_some_of_the_experts_is_loaded_where_they_are() -> None:
    copies, model = Copies(), FakeExperts(16)
    chosen = {
        n: t for n, t in experts(16, 1).items() if n.split(".")[1] in ("1", "2", "5", "9", "13")
    }
    for _ in range(2):
        load(copies, model, chosen)
        other = FakeExperts(16)
        other.load_weights(list(chosen.items()))
        for name, parameter in other.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name
        model.w13.data.zero_()
    assert model.calls == 1
