"""Adam with its fp32 weights and moments in the host's memory: --optimizer-cpu-offload.

12 bytes per parameter leave the card. In a step they pass through it piece by piece: while one is
computed by torch's fused kernel, the next is copied in and the last one out, so a step takes as long
as the bus takes, and gives the same bits as it would with all of it on the card.

Megatron's own class for this flag computes on the host's cores, keeps gradients where clipping by
slime's norm does not look, and builds copies of the whole model on the way.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.optim.adamw import adamw

from slime.backends.megatron.optimizer.host_memory import HostMemory, host_memory_for

# Numbers of one piece: 96 MiB of weights and moments, 2 ms of a PCIe 5 bus.
_PIECE = 8 * 2**20
# Pieces on the card at a time: one comes, one is computed, one goes.
_SLOTS = 3


@dataclass(frozen=True)
class Link:
    """One shard of a parameter: where its gradient, its value and its fp32 weight are.

    Attributes:
        handle: what Megatron takes for the fp32 weight; carries the gradient, and no memory of its
            own unless the model is fp32.
        target: [n] this rank's shard of the model's parameter.
        weight: [n] fp32; on the device it is the handle's memory.
        is_hosted: `weight` and its moments are on the host.
    """

    handle: Tensor
    target: Tensor
    weight: Tensor
    is_hosted: bool


class HostAdam(torch.optim.AdamW):
    """torch's AdamW for weights and moments that may be on the host while gradients are not.

    Args:
        groups: of parameters, with their options; `params` are the handles.
        links: of all parameters, in the order of the groups.
        memory: what the hosted tensors are parts of.
    """

    def __init__(
        self, groups: list[dict[str, Any]], links: Sequence[Link], memory: HostMemory
    ) -> None:
        self._links = {link.weight: link for link in links}
        self._memory = memory
        weights = iter(links)
        for group in groups:
            group["params"] = [next(weights).weight for _ in group["params"]]
        super().__init__(groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all parameters that have a gradient; the model's own are written too."""
        assert closure is None, "a closure would compute gradients, which are ready here"
        pieces = list(self._pieces())
        hosted = [piece for piece in pieces if piece.is_hosted]
        for piece in pieces:
            if not piece.is_hosted:
                piece.compute(piece.state)
        if hosted and hosted[0].grad.is_cuda:
            _stream_through(hosted)
        else:
            for piece in hosted:
                piece.compute(piece.state)
        for weight, link in self._links.items():
            if link.handle.grad is not None:
                self.state[weight]["step"] += 1

    def _pieces(self) -> Iterator["_Piece"]:
        for group in self.param_groups:
            for weight in group["params"]:
                link, state = self._links[weight], self.state[weight]
                if link.handle.grad is None:
                    continue
                tensors = (weight, state["exp_avg"], state["exp_avg_sq"])
                for start in range(0, weight.numel(), _PIECE):
                    part = slice(start, start + _PIECE)
                    yield _Piece(
                        state=tuple(tensor.view(-1)[part] for tensor in tensors),
                        grad=link.handle.grad.view(-1)[part],
                        target=link.target.view(-1)[part],
                        step=float(state["step"]),
                        options=group,
                        is_hosted=link.is_hosted,
                    )


@dataclass(frozen=True)
class _Piece:
    """Some numbers of one parameter: fp32 weight, both moments, and what a step needs besides."""

    state: tuple[Tensor, ...]
    grad: Tensor
    target: Tensor
    step: float
    options: dict[str, Any]
    is_hosted: bool

    def compute(self, state: tuple[Tensor, ...]) -> None:
        """Adam on `state`, which is on the gradient's device; the model gets the new weight."""
        weight, average, square = state
        beta1, beta2 = self.options["betas"]
        adamw(
            [weight],
            [self.grad],
            [average],
            [square],
            [],
            [torch.full((), self.step, dtype=torch.float32, device=weight.device)],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=self.options["lr"],
            weight_decay=self.options["weight_decay"],
            eps=self.options["eps"],
            maximize=False,
        )
        if weight.data_ptr() != self.target.data_ptr():
            self.target.copy_(weight)


class _Slot:
    """Room on the card for one piece, and when it is full, computed and empty again."""

    def __init__(self, device: torch.device) -> None:
        self.room = torch.empty(3, _PIECE, dtype=torch.float32, device=device)
        self.is_full, self.is_computed, self.is_empty = (torch.cuda.Event() for _ in range(3))


def _stream_through(pieces: list[_Piece]) -> None:
    """Compute pieces from the host on the card; all of them are back when this returns."""
    device = pieces[0].grad.device
    slots = [_Slot(device) for _ in range(min(_SLOTS, len(pieces)))]
    here = torch.cuda.current_stream(device)
    way_in, way_out = torch.cuda.Stream(device), torch.cuda.Stream(device)
    way_in.wait_stream(here)  # the room may still be in use by what it was before
    for number, piece in enumerate(pieces):
        slot = slots[number % len(slots)]
        parts = tuple(row[: piece.grad.numel()] for row in slot.room)
        with torch.cuda.stream(way_in):
            way_in.wait_event(slot.is_empty)
            for part, source in zip(parts, piece.state, strict=True):
                part.copy_(source, non_blocking=True)
            slot.is_full.record()
        here.wait_event(slot.is_full)
        piece.compute(parts)
        slot.is_computed.record()
        with torch.cuda.stream(way_out):
            way_out.wait_event(slot.is_computed)
            for part, source in zip(parts, piece.state, strict=True):
                source.copy_(part, non_blocking=True)
            slot.is_empty.record()
    way_out.synchronize()


class HostedOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer whose fp32 weights may be on the host.

    Megatron's own fp32 shards stay as handles: gradients are put there, and the norm and clipping
    read them there. What is optimized, saved and loaded are the weights behind them.
    """

    _links: list[Link]

    @classmethod
    def of(cls, stock: DistributedOptimizer, fraction: float) -> "HostedOptimizer":
        """The same optimizer with `fraction` of its numbers on the host; `stock` is used up."""
        hosted = cls.__new__(cls)
        vars(hosted).update(vars(stock))
        groups: list[dict[str, Any]] = stock.optimizer.param_groups
        handles: list[Tensor] = [handle for group in groups for handle in group["params"]]
        targets = dict(_half_precision_shards(stock))
        moved = _first(handles, fraction)
        memory = host_memory_for(moved, copies=3)
        hosts = {handle: memory.take(handle) for handle in moved}
        links = [
            Link(
                handle,
                target=targets.get(handle, handle.detach()),
                weight=hosts.get(handle, handle.detach()),
                is_hosted=handle in hosts,
            )
            for handle in handles
        ]
        hosted._links = links
        hosted.optimizer = HostAdam(groups, links, memory)
        for link in links:
            if link.is_hosted:
                _leave_device(link, has_own_memory=link.handle in targets)
            take = memory.take if link.is_hosted else torch.empty_like
            hosted.optimizer.state[link.weight] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": take(link.weight).zero_(),
                "exp_avg_sq": take(link.weight).zero_(),
            }
        return hosted

    def get_parameters(self) -> list[Any]:
        """What carries the gradients: norm and clipping look there."""
        return [link.handle for link in self._links]

    def _copy_main_params_to_model_params(self) -> None:
        """Nothing: the step has written each piece while it was on the card."""

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        assert state_dict is None, "weights are taken from the model itself"
        for link in self._links:
            if link.weight.data_ptr() != link.target.data_ptr():
                link.weight.copy_(link.target)


def _half_precision_shards(stock: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(fp32 shard, the model's shard it stands for) of parameters in half precision."""
    for mains, shards in zip(
        stock.shard_fp32_from_float16_groups, stock.shard_float16_groups, strict=True
    ):
        yield from zip(mains, shards, strict=True)


def _first(handles: list[Tensor], fraction: float) -> list[Tensor]:
    """The first of them that make up `fraction` of all numbers, as Megatron counts."""
    limit = fraction * sum(handle.numel() for handle in handles)
    chosen: list[Tensor] = []
    count = 0
    for handle in handles:
        if count >= limit:
            break
        chosen.append(handle)
        count += handle.numel()
    return chosen


@torch.no_grad()
def _leave_device(link: Link, *, has_own_memory: bool) -> None:
    """Move the weight behind a handle; the handle of a model in fp32 is the model's own memory."""
    link.weight.copy_(link.handle)
    if has_own_memory:
        link.handle.untyped_storage().resize_(0)
