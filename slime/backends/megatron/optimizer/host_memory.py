"""The host's memory for what leaves a card: pinned, so that copies run at the speed of the bus.

torch's own pinned tensors take the next power of two, and pages of them are made one by one while
the card waits: here a block is as large as asked for, and threads make its pages.
"""

import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

# Bytes to which each part of a block is padded: whole vectors.
_ALIGNMENT = 256
# A page is made at its first touch, by the kernel on the touching core.
_TOUCH_BYTES = 256 * 2**20
_THREADS = 8


class HostMemory:
    """One block of the host's memory, registered with CUDA where there is a card; parts of it.

    Its tensors hold the block; what registered it lets go when this object goes, so keep it as long
    as copies run.

    Args:
        num_bytes: of all parts together, each counted by `padded_bytes`.

    Raises:
        MemoryError: the host has no such memory, or does not let it be pinned.
    """

    def __init__(self, num_bytes: int) -> None:
        try:
            self._block = _whole_pages(num_bytes)
        except RuntimeError as error:
            raise MemoryError(_message(num_bytes, "could not be had")) from error
        self._used = 0
        if torch.cuda.is_available() and num_bytes:
            _make_pages(self._block)
            _pin(self._block)
            weakref.finalize(self, _unpin, self._block)

    def take(self, like: Tensor) -> Tensor:
        """A tensor of the shape and dtype of `like` that nobody else has; its values are not set."""
        start, num_bytes = self._used, like.numel() * like.element_size()
        self._used += padded_bytes(like)
        assert self._used <= len(self._block), "more parts than were asked for"
        return self._block[start : start + num_bytes].view(like.dtype).view(like.shape)


def padded_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor like this takes of a `HostMemory`."""
    num_bytes = tensor.numel() * tensor.element_size()
    return num_bytes + -num_bytes % _ALIGNMENT


def host_memory_for(tensors: list[Tensor], copies: int = 1) -> HostMemory:
    """A block with room for `copies` of each."""
    return HostMemory(copies * sum(padded_bytes(tensor) for tensor in tensors))


def _whole_pages(num_bytes: int) -> Tensor:
    """At least so many bytes that share no page with anything: what CUDA registers are pages."""
    size = num_bytes + -num_bytes % mmap.PAGESIZE
    room = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
    start = -room.data_ptr() % mmap.PAGESIZE
    return room[start : start + size]


def _make_pages(block: Tensor) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(Tensor.zero_, block.split(_TOUCH_BYTES)))


def _pin(block: Tensor) -> None:
    cudart: Any = torch.cuda.cudart()
    code = cudart.cudaHostRegister(block.data_ptr(), len(block), 0)
    if int(code):
        raise MemoryError(_message(len(block), f"could not be pinned (CUDA error {int(code)})"))


def _unpin(block: Tensor) -> None:
    cudart: Any = torch.cuda.cudart()
    cudart.cudaHostUnregister(block.data_ptr())


def _message(num_bytes: int, what: str) -> str:
    return (
        f"{num_bytes / 2**30:.1f} GiB of the host's memory {what}: weights or optimizer states that "
        "leave the GPU go there. Spread the model over more hosts, or lower "
        "--optimizer-offload-fraction if --optimizer-cpu-offload is given."
    )
