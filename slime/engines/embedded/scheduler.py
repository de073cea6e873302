"""Scheduler: continuous batching over slots; every call belongs to the engine thread."""

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slime.engines.embedded.arrays import as_tensor
from slime.engines.embedded.model import ModelRunner
from slime.engines.embedded.requests import Request
from slime.engines.embedded.sampling import edit_logits, sample
from slime.engines.embedded.shapes import BatchShapes, padded_length
from slime.engines.embedded.shared_prompts import SharedPrompts
from slime.engines.embedded.slots import SlotTable
from slime.engines.embedded.stats import EngineStats
from slime.engines.protocol import Json, PauseMode, finish_abort, finish_length, finish_stop

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """How much runs at once.

    Attributes:
        max_running: requests in slots.
        prefill_tokens: padded prompt tokens of one prefill pass.
        max_kv_bytes: memory for keys and values; None for no limit.
        share_prompts: read equal prompts once and copy their keys and values.
    """

    max_running: int = 128
    prefill_tokens: int = 4096
    max_kv_bytes: int | None = None
    share_prompts: bool = True


class Scheduler:
    """Admits waiting requests, writes one token per running request and step, ends them.

    Attributes:
        weight_version: stamped on every answer.
        is_paused: requests wait, nothing is computed.
        finished: requests that ended since the caller last took them.
        progress: streaming requests that got a token since then, with the answer's length.
    """

    def __init__(
        self, runner: ModelRunner, limits: SchedulerLimits, shapes: BatchShapes | None = None
    ) -> None:
        self.runner = runner
        self.limits = limits
        self.shapes = shapes or BatchShapes.up_to(limits.max_running)
        self.cache = runner.new_cache(self.shapes.largest)
        self.table = SlotTable(self.shapes.largest)
        self.waiting: deque[Request] = deque()
        self.shared = SharedPrompts()
        self.stats = EngineStats()
        self.weight_version = "default"
        self.is_paused = False
        self.finished: list[Request] = []
        self.progress: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return not self.is_paused and bool(self.waiting or self.table.active)

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting or running, paused ones included."""
        return not self.waiting and not self.table.active

    def add(self, request: Request) -> None:
        """Queue a request."""
        request.versions = [(self.weight_version, 0)]
        self.stats.num_requests += 1
        self.waiting.append(request)

    def step(self) -> None:
        """Prefill what can be admitted, or else write one token for every running request."""
        batch = self._admit()
        if batch:
            self._prefill(batch)
        elif self.table.active:
            self._decode()

    # --- control, between steps ---

    def abort(self, matches: Callable[[Request], bool], message: str) -> int:
        """End the requests that match, with what they have; returns how many there were."""
        waiting = [request for request in self.waiting if matches(request)]
        running = [slot for slot, request in enumerate(self.table.requests) if matches(request)]
        if waiting:
            self.waiting = deque(r for r in self.waiting if not matches(r))
        for request in waiting:
            self._finish(request, finish_abort(message))
        for slot in running:
            self.table.requests[slot].finish = finish_abort(message)
        self._leave(running)
        return len(waiting) + len(running)

    def pause(self, mode: PauseMode) -> None:
        """Compute nothing until `resume`; `mode` says what becomes of running requests."""
        self.is_paused = True
        if mode is PauseMode.ABORT:
            self.abort(lambda _: True, "generation was paused with mode abort")
        elif mode is PauseMode.RETRACT:
            self._retract(range(self.table.active))

    def resume(self) -> None:
        """Go on."""
        self.is_paused = False

    def weights_changed(self, version: str | None) -> None:
        """Note new weights: no later prompt may use keys and values of old ones."""
        self.shared.clear()
        if version is None or version == self.weight_version:
            return
        self.weight_version = version
        for request in itertools.chain(self.table.requests, self.waiting):
            slot = request.slot
            num_out = len(request.output_ids) if slot < 0 else int(self.table.num_out[slot])
            if not num_out:
                request.versions = []
            request.versions.append((version, num_out))

    def release_memory(self) -> None:
        """Free keys and values; only while idle."""
        self.shared.clear()
        self.cache.release()

    # --- admission ---

    def _admit(self) -> dict[bytes, list[Request]]:
        """Waiting requests to prefill now, oldest first; those with equal tokens under one key."""
        groups: dict[bytes, list[Request]] = {}
        width = num_fresh = num_requests = 0
        for request in self.waiting:
            tokens = request.tokens
            key = self._share_key(request, tokens)
            is_fresh = key not in groups and key not in self.shared
            wider = max(width, padded_length(len(tokens))) if is_fresh else width
            if num_fresh and (num_fresh + is_fresh) * wider > self.limits.prefill_tokens:
                break
            if not self._fits(self.table.active + num_requests + 1, len(tokens) + 1):
                break
            groups.setdefault(key, []).append(request)
            width, num_fresh, num_requests = wider, num_fresh + is_fresh, num_requests + 1
        for _ in range(num_requests):
            self.waiting.popleft()
        return groups

    def _share_key(self, request: Request, tokens: NDArray[np.int64]) -> bytes:
        """Equal for requests that may share a prefill; those that ask for input log-probs read
        their prompt themselves."""
        if self.limits.share_prompts and request.logprob_start_len < 0:
            return tokens.tobytes()
        return b"own" + id(request).to_bytes(8)

    def _fits(self, num_rows: int, length: int) -> bool:
        """Whether slots and memory allow so many rows, one of them of this length."""
        if num_rows > self.limits.max_running:
            return False
        if self.limits.max_kv_bytes is None or num_rows == 1:
            return True
        longest = max(length, int(self.table.lengths[: self.table.active].max(initial=0)))
        size = self.shapes.rows(num_rows) * padded_length(longest) * self.cache.bytes_per_token
        return size <= self.limits.max_kv_bytes

    # --- one pass ---

    def _prefill(self, groups: dict[bytes, list[Request]]) -> None:
        """Read each group's tokens once, copy their KV to its other slots, write first tokens."""
        first = self.table.active
        num_requests = sum(map(len, groups.values()))
        longest = max(len(group[0].tokens) for group in groups.values())
        rows = self.shapes.rows(first + num_requests)
        self.cache.reserve(rows, padded_length(longest + 1))
        fresh = [(key, group.pop(0)) for key, group in groups.items() if key not in self.shared]
        if fresh:
            self._read(fresh)
        sources: list[int] = []
        for key, group in groups.items():
            for request in group:
                sources.append(self.shared[key].slot)
                self._place(request)
                self.shared.join(key, request)
                request.cached_tokens = len(request.prompt)
        if sources:
            targets = list(range(self.table.active - len(sources), self.table.active))
            self.cache.copy_slots(sources, targets, longest)
        placed = self.table.requests[first:]
        logits = torch.stack([self.shared.logits_of(request) for request in placed])
        self.stats.prompt_tokens += sum(len(request.prompt) for request in placed)
        self.stats.cached_tokens += sum(request.cached_tokens for request in placed)
        self._write(logits, np.arange(first, self.table.active))

    def _read(self, fresh: list[tuple[bytes, Request]]) -> None:
        """Prefill requests into the next slots and keep the logits after their last tokens."""
        tokens = [request.tokens for _, request in fresh]
        ids = np.zeros((len(fresh), padded_length(max(map(len, tokens)))), np.int64)
        for row, own in enumerate(tokens):
            ids[row, : len(own)] = own
        hidden = self.runner.prefill(self.cache, self.table.active, ids)
        # Padded like a decode pass: the output layer's bits depend on the number of rows as well.
        ends = np.zeros((2, self.shapes.rows(len(fresh))), np.int64)
        ends[:, : len(fresh)] = [range(len(fresh)), [len(own) - 1 for own in tokens]]
        logits = self.runner.logits(hidden[as_tensor(ends[0]), as_tensor(ends[1])])
        for row, (key, request) in enumerate(fresh):
            self._place(request)
            self.shared.put(key, request, logits[row])
            if request.logprob_start_len >= 0 and request.input_log_probs is None:
                self._score_prompt(request, hidden[row])

    def _score_prompt(self, request: Request, hidden: Tensor) -> None:
        """Log-probs of the prompt's own tokens; hidden is [Q, H] of its row."""
        start, prompt = request.logprob_start_len, request.prompt
        scores = self.runner.token_log_probs(hidden[start : len(prompt) - 1], prompt[start + 1 :])
        request.input_log_probs = scores.tolist()

    def _decode(self) -> None:
        """Write one token for every running request."""
        self._make_room()
        num_rows = self.table.active
        rows = self.shapes.rows(num_rows)
        lengths = self.table.lengths[:rows]
        # Rows of padding write to position 0 of free slots and read what they wrote.
        lengths[num_rows:] = 0
        kv_length = padded_length(int(lengths.max()) + 1)
        self.cache.reserve(rows, kv_length)
        logits = self.runner.decode(self.cache, self.table.last[:rows], lengths, kv_length)
        lengths[:num_rows] += 1
        self._write(logits[:num_rows], np.arange(num_rows))

    @torch.inference_mode()
    def _write(self, logits: Tensor, slots: NDArray[np.int64]) -> None:
        """Sample one token per slot, and let go of the requests this ends."""
        for position in self.table.slots_to_edit(slots):
            slot = int(slots[position])
            request = self.table.requests[slot]
            edit_logits(
                logits[position], request.params, self.table.outputs(slot), request.stop_ids
            )
        tokens, log_probs = sample(logits, self.table.sampling_columns(slots))
        self.stats.count_step(len(slots))
        ended: list[int] = []
        notable: list[int] = self.table.append(slots, tokens, log_probs).tolist()
        for slot in notable:
            request = self.table.requests[slot]
            request.finish = self._ending(slot, request)
            if request.finish is not None:
                ended.append(slot)
            elif request.stream:
                self.table.store_outputs(slot)
                self.progress.append(request)
        if ended:
            self._leave(ended)

    def _ending(self, slot: int, request: Request) -> Json | None:
        """Why the request ends with its newest token, or None; the order is SGLang's."""
        token = int(self.table.last[slot])
        matched = None if request.stop_strings is None else request.stop_strings.push(token)
        if self.table.is_full(slot):
            return finish_length(min(int(self.table.num_out[slot]), request.max_out))
        if not self.table.last_is_finite(slot):
            return finish_abort("the model's logits are not finite; are its weights?", 500)
        if self.table.hit_stop(slot):
            return finish_stop(token)
        return None if matched is None else finish_stop(matched)

    # --- slots ---

    def _place(self, request: Request) -> None:
        if request.admitted_at is None:
            request.admitted_at = time.monotonic()
        self.table.place(request)

    def _leave(self, slots: Iterable[int]) -> None:
        """Take requests out of their slots and hand the ended ones over."""
        leaving = {slot: self.table.requests[slot] for slot in slots}
        for slot, request in leaving.items():
            self.table.store_outputs(slot)
            self.shared.leave(request)
        sources, targets = self.table.remove(list(leaving))
        if targets:
            self.cache.copy_slots(sources, targets, int(self.table.lengths[targets].max()))
        for request in leaving.values():
            if request.finish is not None:
                self._finish(request, request.finish)

    def _finish(self, request: Request, reason: Json) -> None:
        request.finish = reason
        request.finished_at = time.monotonic()
        self.stats.count_finished(request)
        self.finished.append(request)

    def _retract(self, slots: Iterable[int]) -> None:
        """Put running requests back at the head of the queue, with their tokens, oldest first."""
        requests = [self.table.requests[slot] for slot in slots]
        self._leave([request.slot for request in requests])
        self.stats.num_retracted += len(requests)
        self.waiting.extendleft(sorted(requests, key=lambda r: r.created_at, reverse=True))

    def _make_room(self) -> None:
        """Retract the newest requests while the next token of all would not fit into memory."""
        while self.table.active > 1:
            longest = int(self.table.lengths[: self.table.active].max()) + 1
            if self._fits(self.table.active, longest):
                return
            newest = max(self.table.requests, key=lambda request: request.created_at)
            logger.warning("memory for keys and values is full: %s waits again", newest.rid)
            self._retract([newest.slot])
