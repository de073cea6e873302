"""Routing replay: experts chosen in an earlier pass, or by the engine, are chosen again in training.

A token whose probabilities for two experts are nearly equal may take another one after a rounding
error; its log-prob then jumps, and the ratio of new and old says nothing about the policy. So the
choice is kept and only the probabilities of the chosen experts are computed anew, with gradient.

Source: Ma et al. 2025, "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference
Routers", arXiv:2510.11370 (from the engine); Zheng et al. 2025, arXiv:2512.01374 (from the log-prob
pass). The seam is Megatron-Core's `RouterReplay`.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from slime.backends.megatron.layers.dense import LastLayer, used_rows
from slime.backends.megatron.packs.pack import MicroBatch
from slime.backends.megatron.process.parallel import tp_group
from slime.data.batch import FILLER_INDEX, RolloutBatch
from slime.errors import ConfigError, DataError


class Routing(Enum):
    """How the routers choose during a pass."""

    OWN = "own"
    RECORD = "record"
    REPLAY = "replay"


class ExpertReplay(RouterReplay):
    """The choice of one router; a row of -1 leaves it to the router.

    Attributes:
        trains: a backward pass follows, which may compute a layer again.
    """

    def __init__(self) -> None:
        super().__init__()
        RouterReplay.global_router_replay_instances.remove(self)  # that list would keep it for ever
        self.trains = False

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """([T, K] scores, [T, K] experts) of scores [T, E]."""
        assert default_compute_topk is not None, "Megatron's router passes it"
        values, own = default_compute_topk(scores, topk, num_groups, group_topk)
        if self.router_replay_action is RouterReplayAction.RECORD:
            self.record_indices(own)
        if self.router_replay_action in (None, RouterReplayAction.RECORD):
            return values, own
        wanted = self._wanted().to(scores.device, own.dtype)
        experts = torch.where(wanted < 0, own, wanted)
        return scores.gather(1, experts), experts

    def _wanted(self) -> Tensor:
        if self.router_replay_action is RouterReplayAction.REPLAY_BACKWARD:
            # Backward passes of a chunk come in the order of its forward passes.
            return self.replay_backward_list.pop(0)
        wanted = self.target_topk_idx
        assert wanted is not None, "set before each forward pass"
        if self.trains and not torch.is_grad_enabled():  # so this will be computed again
            self.replay_backward_list.append(wanted)
        return wanted


@dataclass(frozen=True)
class _Router:
    """A router of this rank: its replay, its layer in the whole model, and whether the layer
    computes only rows whose output is used."""

    replay: ExpertReplay
    layer: int
    is_last: bool


class RoutingReplay:
    """The choices of all routers of one rank's model.

    Args:
        model: its chunks.
        args: Megatron's.
        from_engine: replay what the engine chose, which travels in the batch; else what the last
            log-prob pass of the actor chose.

    Raises:
        ConfigError: the model has no experts.
    """

    def __init__(self, model: Sequence[torch.nn.Module], args: Any, *, from_engine: bool) -> None:
        if not args.num_experts:
            raise ConfigError(
                "Routing replay is for mixtures of experts, and this model has none; leave out "
                "--use-routing-replay and --use-rollout-routing-replay."
            )
        self.from_engine = from_engine
        self._args = args
        self._routers = [_install(chunk) for chunk in model]
        self._chunks = {id(chunk): number for number, chunk in enumerate(model)}
        self._routing = Routing.OWN
        self._checked: weakref.ref[RolloutBatch] | None = None
        # (chunk, samples of the micro-batch) -> int16 [T, K] on the CPU for each router
        self._recorded: dict[tuple[int, tuple[int, ...]], list[Tensor]] = {}

    def check(self, batch: RolloutBatch) -> None:
        """Nothing, if each sample that trains has what the engine should have recorded.

        Raises:
            DataError: it has not, or for another model.
        """
        layers = sorted({router.layer for routers in self._routers for router in routers})
        has_seen = self._checked is not None and self._checked() is batch
        if not self.from_engine or not layers or has_seen:
            return
        rows: Sequence[Tensor | None] = batch.rollout_routed_experts or [None] * len(batch)
        masks = batch.loss_masks.rows()
        for i, experts in enumerate(rows):
            index = batch.sample_indices[i]
            if experts is not None:
                self._check_experts(experts, layers, batch.tokens.lengths[i], index)
            elif index != FILLER_INDEX and bool(masks[i].any()):
                raise DataError(
                    f"sample {index} trains but has no rollout_routed_experts, which "
                    "--use-rollout-routing-replay replays; the generate function has to request "
                    "return_routed_experts and keep them"
                )
        self._checked = weakref.ref(batch)

    def _check_experts(self, experts: Tensor, layers: list[int], total: int, index: int) -> None:
        args = self._args
        shape = (total - 1, args.num_layers, args.moe_router_topk)
        if tuple(experts.shape) != shape:
            raise DataError(
                f"sample {index}: rollout_routed_experts has shape {list(experts.shape)}, expected "
                f"[tokens - 1, layers, experts per token] = {list(shape)}; is the engine's model "
                "another one?"
            )
        ordered = experts[:, layers].sort(-1).values
        is_choice = (ordered[..., 0] >= 0) & (ordered[..., -1] < args.num_experts)
        is_choice &= (ordered.diff(dim=-1) > 0).all(-1)
        is_good = is_choice | (ordered == -1).all(-1)
        if not bool(is_good.all()):
            token, layer = (~is_good).nonzero()[0].tolist()
            found = experts[token, layers[layer]].tolist()
            raise DataError(
                f"sample {index}: rollout_routed_experts of token {token} in layer "
                f"{layers[layer]} are {found}; expected different numbers from 0 to "
                f"{args.num_experts - 1}, or -1 alone"
            )

    @contextlib.contextmanager
    def during(self, routing: Routing, *, trains: bool) -> Iterator[None]:
        """All routers choose in this way within the block, which is one pass."""
        if routing is Routing.RECORD:
            self._recorded.clear()
        self._routing = routing
        for router in self._all():
            router.replay.trains = trains
        try:
            yield
        finally:
            self._routing = Routing.OWN
            for router in self._all():
                router.replay.clear_indices()
                router.replay.clear_router_replay_action()

    @contextlib.contextmanager
    def forward(
        self, chunk: torch.nn.Module, micro: MicroBatch, batch: RolloutBatch
    ) -> Iterator[None]:
        """The block is the forward pass of one chunk on one micro-batch.

        Raises:
            DataError: nothing was recorded for these samples.
        """
        if self._routing is Routing.OWN:
            yield
            return
        number = self._chunks[id(chunk)]
        routers = self._routers[number]
        if self._routing is Routing.RECORD:
            _act(routers, RouterReplayAction.RECORD)
            yield
            self._recorded[number, micro.samples] = [_taken(router.replay) for router in routers]
            return
        for router, experts in zip(routers, self._wanted(number, micro, batch), strict=True):
            router.replay.target_topk_idx = experts
        _act(routers, RouterReplayAction.REPLAY_FORWARD)
        yield
        # What the backward pass computes again is what this forward pass computed.
        _act(routers, RouterReplayAction.REPLAY_BACKWARD)

    def _wanted(self, chunk: int, micro: MicroBatch, batch: RolloutBatch) -> list[Tensor]:
        """[rows, K] for each router of the chunk."""
        if self.from_engine:
            return self._engines(self._routers[chunk], micro, batch)
        recorded = self._recorded.get((chunk, micro.samples))
        if recorded is None:
            raise DataError(
                "--use-routing-replay: no log-prob pass has recorded the experts of these samples; "
                "give --use-rollout-routing-replay where there is none"
            )
        return [experts.to(micro.tokens.device, non_blocking=True) for experts in recorded]

    def _engines(
        self, routers: Sequence[_Router], micro: MicroBatch, batch: RolloutBatch
    ) -> list[Tensor]:
        if not routers:
            return []
        layers = [router.layer for router in routers]
        shape = (len(layers), self._args.moe_router_topk)
        table = torch.cat([_whole(batch, i, layers, shape) for i in micro.samples])
        # -1 picks the row after the last.
        table = torch.cat([table, table.new_full((1, *shape), -1)])
        rows = table[micro.origins].to(micro.tokens.device)
        config = self._args
        local = rows
        if config.sequence_parallel:
            local = rows.chunk(tp_group().size())[tp_group().rank()]
        outputs = used_rows(config, micro.packed)
        return [
            local[:, i] if outputs is None or not router.is_last else rows[outputs, i]
            for i, router in enumerate(routers)
        ]

    def _all(self) -> Iterator[_Router]:
        for routers in self._routers:
            yield from routers


def _install(chunk: torch.nn.Module) -> list[_Router]:
    """Give each router of a chunk a replay; they stand in the order of the layers."""
    routers: list[_Router] = []
    bare: Any = chunk
    while hasattr(bare, "module"):
        bare = bare.module
    for layer in bare.decoder.layers:
        for module in cast(torch.nn.Module, layer).modules():
            if isinstance(module, TopKRouter):
                module.router_replay = replay = ExpertReplay()
                is_last = isinstance(layer, LastLayer)
                routers.append(_Router(replay, layer.layer_number - 1, is_last))
    return routers


def _act(routers: Sequence[_Router], action: RouterReplayAction) -> None:
    for router in routers:
        router.replay.set_router_replay_action(action)


def _taken(replay: ExpertReplay) -> Tensor:
    """What was recorded, small and on the CPU."""
    recorded = replay.get_recorded_indices()
    assert recorded is not None, "the router has run"
    return recorded.to(torch.int16).cpu()


def _whole(batch: RolloutBatch, i: int, layers: list[int], shape: tuple[int, int]) -> Tensor:
    """[S, layers, K] int16 of a sample, -1 where nothing is known: at least its last token."""
    table = torch.full((batch.tokens.lengths[i], *shape), -1, dtype=torch.int16)
    rows = batch.rollout_routed_experts
    experts = None if rows is None else rows[i]
    if experts is not None:
        table[:-1] = experts[:, layers]
    return table
