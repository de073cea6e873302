"""SlotTable: the state of running requests as columns, so that a step costs no Python per row."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slime.engines.embedded.requests import Request
from slime.engines.embedded.sampling import SamplingColumns
from slime.engines.embedded.seeds import uniforms

_FIRST_OUTPUTS = 64
_FIRST_STOPS = 4
_MASK64 = (1 << 64) - 1


class SlotTable:
    """Columns over slots; running requests fill [0, active) without holes.

    Attributes:
        requests: the running ones, by slot.
        lengths: tokens in the cache.
        last: the newest token, not in the cache yet.
    """

    def __init__(self, num_slots: int) -> None:
        self.requests: list[Request] = []
        self.lengths = np.zeros(num_slots, np.int64)
        self.last = np.zeros(num_slots, np.int64)
        self.num_out = np.zeros(num_slots, np.int64)
        self._max_out = np.zeros(num_slots, np.int64)
        self._temperature = np.ones(num_slots, np.float32)
        self._top_p = np.ones(num_slots, np.float32)
        self._top_k = np.ones(num_slots, np.int64)
        self._min_p = np.zeros(num_slots, np.float32)
        self._seeds = np.zeros(num_slots, np.uint64)
        self._needs_python = np.zeros(num_slots, np.bool_)
        self._needs_edits = np.zeros(num_slots, np.bool_)
        self._stop_ids = np.full((num_slots, _FIRST_STOPS), -1, np.int64)
        self._outputs = np.zeros((num_slots, _FIRST_OUTPUTS), np.int32)
        self._log_probs = np.zeros((num_slots, _FIRST_OUTPUTS), np.float32)

    @property
    def active(self) -> int:
        """Number of running requests."""
        return len(self.requests)

    def place(self, request: Request) -> None:
        """Give a request the next slot; its tokens so far count as prefilled."""
        slot = request.slot = len(self.requests)
        self.requests.append(request)
        params, num_out = request.params, len(request.output_ids)
        self.lengths[slot] = len(request.prompt) + num_out
        self.num_out[slot] = num_out
        self._max_out[slot] = request.max_out
        self._temperature[slot] = params.temperature
        self._top_p[slot] = params.top_p
        self._top_k[slot] = params.top_k
        self._min_p[slot] = params.min_p
        self._seeds[slot] = request.seed & _MASK64
        self._needs_python[slot] = request.stop_strings is not None or request.stream
        self._needs_edits[slot] = request.needs_logit_edits
        self._place_stops(slot, () if params.ignore_eos else request.stop_ids)
        if num_out:
            self._grow_outputs(num_out)
            self._outputs[slot, :num_out] = request.output_ids
            self._log_probs[slot, :num_out] = request.output_log_probs

    def sampling_columns(self, slots: NDArray[np.int64]) -> SamplingColumns:
        """Sampling parameters and random numbers for the next token of some slots."""
        return SamplingColumns(
            temperature=self._temperature[slots],
            top_p=self._top_p[slots],
            top_k=self._top_k[slots],
            min_p=self._min_p[slots],
            uniform=uniforms(self._seeds[slots], self.num_out[slots]),
        )

    def slots_to_edit(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions in `slots` of requests whose logits need an edit."""
        return np.flatnonzero(self._needs_edits[slots])

    def append(
        self, slots: NDArray[np.int64], tokens: NDArray[np.int64], log_probs: NDArray[np.float32]
    ) -> NDArray[np.int64]:
        """Write one token per slot; returns the slots that the caller must look at.

        Those are the ones that reached their length or a stop token, whose log-prob is no number,
        or whose request wants every token (stop strings, streaming).
        """
        place = self.num_out[slots]
        self._grow_outputs(int(place.max()) + 1)
        self._outputs[slots, place] = tokens
        self._log_probs[slots, place] = log_probs
        self.num_out[slots] = place + 1
        self.last[slots] = tokens
        notable = place + 1 >= self._max_out[slots]
        notable |= (tokens[:, None] == self._stop_ids[slots]).any(1)
        notable |= self._needs_python[slots] | ~np.isfinite(log_probs)
        return slots[notable]

    def is_full(self, slot: int) -> bool:
        """Whether an answer has all the tokens it may have."""
        return bool(self.num_out[slot] >= self._max_out[slot])

    def hit_stop(self, slot: int) -> bool:
        """Whether the newest token is one of the request's stop tokens."""
        return bool((self._stop_ids[slot] == self.last[slot]).any())

    def last_is_finite(self, slot: int) -> bool:
        """Whether the newest token's log-prob is a number."""
        return bool(np.isfinite(self._log_probs[slot, self.num_out[slot] - 1]))

    def outputs(self, slot: int) -> NDArray[np.int32]:
        """[R] the answer so far."""
        return self._outputs[slot, : self.num_out[slot]]

    def store_outputs(self, slot: int) -> None:
        """Copy the answer so far into its request."""
        request = self.requests[slot]
        count = min(int(self.num_out[slot]), request.max_out)
        request.output_ids = self._outputs[slot, :count].tolist()
        request.output_log_probs = self._log_probs[slot, :count].tolist()

    def remove(self, slots: Sequence[int]) -> tuple[list[int], list[int]]:
        """Take requests out and move the last ones into the holes; returns (from, to) slots."""
        gone = set(slots)
        keep = self.active - len(gone)
        for slot in gone:
            self.requests[slot].slot = -1
        to_slots = [slot for slot in sorted(gone) if slot < keep]
        from_slots = [slot for slot in range(keep, self.active) if slot not in gone]
        if to_slots:
            columns = (
                self.lengths, self.last, self.num_out, self._max_out, self._temperature,
                self._top_p, self._top_k, self._min_p, self._seeds, self._needs_python,
                self._needs_edits, self._stop_ids, self._outputs, self._log_probs,
            )  # fmt: skip
            for column in columns:
                column[to_slots] = column[from_slots]
            for source, target in zip(from_slots, to_slots, strict=True):
                request = self.requests[target] = self.requests[source]
                request.slot = target
        del self.requests[keep:]
        return from_slots, to_slots

    def _place_stops(self, slot: int, stop_ids: tuple[int, ...]) -> None:
        num_slots, width = self._stop_ids.shape
        if len(stop_ids) > width:
            more = np.full((num_slots, len(stop_ids) - width), -1, np.int64)
            self._stop_ids = np.concatenate([self._stop_ids, more], 1)
        self._stop_ids[slot] = -1
        self._stop_ids[slot, : len(stop_ids)] = stop_ids

    def _grow_outputs(self, count: int) -> None:
        width = self._outputs.shape[1]
        if count <= width:
            return
        more = ((0, 0), (0, max(count, 2 * width) - width))
        self._outputs = np.pad(self._outputs, more)
        self._log_probs = np.pad(self._log_probs, more)
