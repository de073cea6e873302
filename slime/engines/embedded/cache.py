"""SlotCache: keys and values of all running requests, one slot (row) each."""

from typing import Any

import torch
from torch import Tensor

# Buffers grow in steps, so that a long context costs memory only once a request is that long.
_LENGTH_STEP = 256
_SLOT_STEP = 8


class SlotCache:
    """Per-layer buffers [slots, kv_heads, length, dim] behind the interface transformers' models
    call.

    Active requests keep the slots [0, B): a decode step reads a *view* of them, without a gather.
    Keys and values may differ in width (MLA): buffers are made from the first tensors seen.

    Args:
        max_slots: most rows ever needed.
        max_length: most tokens per row ever needed.
    """

    # What transformers' mask helpers ask of a cache.
    is_compileable = False
    is_sliding = (False,)

    def __init__(self, max_slots: int, max_length: int) -> None:
        self.max_slots = max_slots
        self.max_length = max_length
        self.num_slots = 0
        self.length = 0
        self._keys: list[Tensor | None] = []
        self._values: list[Tensor | None] = []
        self._rows = slice(0, 0)
        self._row_ids: Tensor | None = None
        self._positions: Tensor | None = None
        self._kv_length = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token; 0 before the first pass."""
        return sum(b.shape[1] * b.shape[3] * b.element_size() for b in self._buffers())

    @torch.inference_mode()
    def reserve(self, num_slots: int, length: int) -> None:
        """Grow the buffers to at least this many rows and tokens per row; contents stay."""
        if num_slots <= self.num_slots and length <= self.length:
            return
        slots = max(self.num_slots, min(self.max_slots, _up(num_slots, _SLOT_STEP)))
        tokens = self.length
        if length > tokens:
            # By half at least: each growth copies everything.
            tokens = min(self.max_length, _up(max(length, tokens * 3 // 2), _LENGTH_STEP))
        for buffers in (self._keys, self._values):
            for layer, old in enumerate(buffers):
                if old is not None:
                    new = old.new_zeros(slots, old.shape[1], tokens, old.shape[3])
                    new[: self.num_slots, :, : self.length] = old
                    buffers[layer] = new
        self.num_slots, self.length = slots, tokens

    def release(self) -> None:
        """Give all memory back; only while no request runs."""
        self._keys, self._values = [], []
        self.num_slots = self.length = 0

    def plan_prefill(self, first_slot: int, num_rows: int) -> None:
        """The next pass writes whole prompts, from position 0, into slots from `first_slot` on."""
        self._rows = slice(first_slot, first_slot + num_rows)
        self._positions = None

    def plan_decode(self, positions: Tensor, kv_length: int) -> None:
        """The next pass writes one token per slot [0, B) at `positions` [B] and reads
        `kv_length`."""
        num_rows = positions.shape[0]
        self._rows = slice(0, num_rows)
        if self._row_ids is None or self._row_ids.shape[0] != num_rows:
            self._row_ids = torch.arange(num_rows)
        self._positions = positions
        self._kv_length = kv_length

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, kv_heads, Q, D]; returns those the layer attends to.

        The name and arguments are transformers'.
        """
        keys = self._buffer(self._keys, layer_idx, key)
        values = self._buffer(self._values, layer_idx, value)
        if self._positions is None:
            num_tokens = key.shape[2]
            keys[self._rows, :, :num_tokens] = key
            values[self._rows, :, :num_tokens] = value
            return key, value
        keys[self._row_ids, :, self._positions] = key[:, :, 0]
        values[self._row_ids, :, self._positions] = value[:, :, 0]
        return keys[self._rows, :, : self._kv_length], values[self._rows, :, : self._kv_length]

    @torch.inference_mode()
    def copy_slots(self, source: list[int], target: list[int], length: int) -> None:
        """Copy the first `length` tokens of slots `source` to slots `target`, pairwise."""
        from_ids, to_ids = torch.tensor(source), torch.tensor(target)
        for buffer in self._buffers():
            buffer[to_ids, :, :length] = buffer[from_ids, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always given explicitly."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys read by this pass, and their offset; masks are given explicitly, so rarely asked."""
        return (query_length if self._positions is None else self._kv_length), 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Most tokens per row."""
        return self.max_length

    def __len__(self) -> int:
        return len(self._keys)

    def _buffers(self) -> list[Tensor]:
        return [buffer for buffer in (*self._keys, *self._values) if buffer is not None]

    def _buffer(self, buffers: list[Tensor | None], layer: int, like: Tensor) -> Tensor:
        while len(buffers) <= layer:
            buffers.append(None)
        found = buffers[layer]
        if found is None:
            found = like.new_zeros(self.num_slots, like.shape[1], self.length, like.shape[3])
            buffers[layer] = found
        return found


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
