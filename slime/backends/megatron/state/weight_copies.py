"""Other weights for the same model: reference, old actor, teacher; swapped in to compute with."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slime.backends.megatron.optimizer.host_memory import HostMemory, host_memory_for
from slime.backends.megatron.state.named_weights import global_weights
from slime.training.interface import ModelTag


class WeightCopies:
    """CPU copies of a model's weights by tag.

    On CPU swapping exchanges pointers and costs nothing. On CUDA the live weights go to pinned
    memory and the others come in; both directions are copies over PCIe.
    """

    def __init__(self, model: Sequence[torch.nn.Module]) -> None:
        self._parameters = [weight for _, weight in global_weights(model)]
        self._copies: dict[ModelTag, list[Tensor]] = {}
        self._live_backup: list[Tensor] | None = None
        self._memories: list[HostMemory] = []

    def __contains__(self, tag: ModelTag) -> bool:
        return tag in self._copies

    @torch.no_grad()
    def store(self, tag: ModelTag) -> None:
        """Keep the live weights as `tag`, replacing what it held."""
        if tag not in self._copies:
            self._copies[tag] = self._empty_copy()
        for copy, parameter in zip(self._copies[tag], self._parameters, strict=True):
            copy.copy_(parameter)

    @contextlib.contextmanager
    def swapped_in(self, tag: ModelTag) -> Iterator[None]:
        """The model computes with `tag` inside the block; after it, bit for bit as before."""
        if not self._parameters or not self._parameters[0].is_cuda:
            with self._pointers_exchanged(self._copies[tag]):
                yield
            return
        self._live_backup = self._live_backup or self._empty_copy()
        self._copy(self._live_backup, [parameter.data for parameter in self._parameters])
        self._copy([parameter.data for parameter in self._parameters], self._copies[tag])
        try:
            yield
        finally:
            self._copy([parameter.data for parameter in self._parameters], self._live_backup)

    @contextlib.contextmanager
    def _pointers_exchanged(self, tensors: list[Tensor]) -> Iterator[None]:
        live = [parameter.data for parameter in self._parameters]
        self._point_at(tensors)
        try:
            yield
        finally:
            self._point_at(live)

    def _point_at(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            parameter.data = tensor

    def _empty_copy(self) -> list[Tensor]:
        memory = host_memory_for(self._parameters)
        self._memories.append(memory)
        return [memory.take(parameter) for parameter in self._parameters]

    @staticmethod
    @torch.no_grad()
    def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
