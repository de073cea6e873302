"""Device memory given back between updates: weights and optimizer state go to the host.

The storage behind each tensor is emptied and later filled again, so every view of it (parameters,
gradients, shards of the optimizer) is what it was before. Megatron frees its gradient buffers in
the same way. Stock torch does all of it: no allocator is put in the place of its own.
"""

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.parallel_state import get_global_memory_buffer
from torch import Tensor

from slime.backends.megatron.optimizer.distributed import gradient_buffers, torch_optimizers
from slime.backends.megatron.optimizer.host_memory import HostMemory, host_memory_for


@dataclass
class _Kept:
    """One storage: its size, and its bytes on the host while the trainer sleeps; None = zeros."""

    storage: torch.UntypedStorage
    num_bytes: int
    copy: Tensor | None


class DeviceMemory:
    """All that a trainer holds on its device between steps.

    Args:
        model: its chunks.
        optimizer: of them.
    """

    def __init__(self, model: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer):
        self._model = model
        self._optimizer = optimizer
        self._kept: list[_Kept] | None = None
        # The host's side of each storage, made once: pinning takes longer than copying.
        self._host: dict[int, Tensor] = {}
        self._memory: HostMemory | None = None

    @property
    def is_away(self) -> bool:
        """Whether it has been given back."""
        return self._kept is not None

    @torch.no_grad()
    def give_back(self) -> int:
        """Empty every storage; bytes that are free now. The second call does nothing."""
        if self._kept is not None:
            return 0
        scratch = {_key(tensor) for tensor in self._gradients()}
        storages: dict[int, Tensor] = {}
        for tensor in (*self._contents(), *self._gradients()):
            storage = tensor.untyped_storage()
            # On a CPU some memory belongs to others, such as numpy: it stays.
            if storage.nbytes() and storage.resizable():
                storages.setdefault(_key(tensor), tensor)
        wholes = {key: _bytes_of(tensor.untyped_storage()) for key, tensor in storages.items()}
        self._make_room({key: whole for key, whole in wholes.items() if key not in scratch})
        self._kept = [
            _Kept(tensor.untyped_storage(), len(wholes[key]), self._host.get(key))
            for key, tensor in storages.items()
        ]
        for key, host in self._host.items():
            host.copy_(wholes[key], non_blocking=True)
        _synchronize()
        del wholes
        for kept in self._kept:
            kept.storage.resize_(0)
        # Buffers that sequence parallelism gathers into; made again when they are missing.
        get_global_memory_buffer().buffer.clear()
        if torch.cuda.is_available():
            gc.collect()
            cast(Any, torch)._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
        return sum(kept.num_bytes for kept in self._kept)

    @torch.no_grad()
    def take_again(self) -> None:
        """Fill every storage with what it held; gradients are 0. The second call does nothing."""
        for kept in self._kept or []:
            kept.storage.resize_(kept.num_bytes)
            whole = _bytes_of(kept.storage)
            if kept.copy is None:
                whole.zero_()
            else:
                whole.copy_(kept.copy, non_blocking=True)
        _synchronize()
        self._kept = None

    def _make_room(self, wholes: dict[int, Tensor]) -> None:
        """Room on the host for each of these, as it was the last time if they are the same."""
        if {key: len(host) for key, host in self._host.items()} == {
            key: len(whole) for key, whole in wholes.items()
        }:
            return
        self._memory = host_memory_for(list(wholes.values()))
        self._host = {key: self._memory.take(whole) for key, whole in wholes.items()}

    def _contents(self) -> Iterator[Tensor]:
        for chunk in self._model:
            yield from (parameter.data for parameter in chunk.parameters())
            # The wrapper has an attribute `buffers` of its own.
            yield from cast(torch.nn.Module, chunk.module).buffers()
        for optimizer in torch_optimizers(self._optimizer):
            for group in optimizer.param_groups:
                yield from _on_device(parameter.data for parameter in group["params"])
            for state in optimizer.state.values():
                yield from _on_device(state.values())

    def _gradients(self) -> Iterator[Tensor]:
        for chunk in self._model:
            for buffer in gradient_buffers(chunk):
                yield buffer.grad_data


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """All of a storage as [bytes] uint8."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return whole.set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _key(tensor: Tensor) -> int:
    """The same for all tensors of one storage, also while it is empty."""
    return tensor.untyped_storage()._cdata


def _on_device(values: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among them that fill device memory; on a machine without one, all."""
    for value in values:
        if isinstance(value, Tensor) and (value.is_cuda or not torch.cuda.is_available()):
            yield value


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
