"""One weight sync: pause, send in buckets (the last one with the version), verify, resume.

While engines load one bucket, the next one is gathered and sent.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from slime.engines.checksum import Sums, start_strip_checksums
from slime.engines.protocol import PauseMode
from slime.errors import WeightSyncError
from slime.observability.timeline import add_span
from slime.observability.waits import waiting
from slime.weights.buckets import make_buckets, mark_last
from slime.weights.transport import Bucket, WeightTransport


class Pausable(Protocol):
    """What a sync asks of the engines; EngineControl has it."""

    @property
    def urls(self) -> tuple[str, ...]: ...
    @property
    def timeout_s(self) -> float: ...
    def pause(self, mode: str) -> None: ...
    def resume(self) -> None: ...


@dataclass
class SyncReport:
    """What a sync did, and where this rank's time went, seconds.

    Attributes:
        digest: of every bit of the weights, whatever order and buckets they came in; empty when
            the sync was not verified.
        verified_by: whose checksums were compared with the trainer's.
        density: share of the bytes that changed, where only those were written.
        write_s: of files, while the engines still generate.
        gather_s: making buckets: gathering over ranks, and Hugging Face's form of each weight.
        send_s: putting them on their way.
        load_s: waiting for engines to have loaded one.
        verify_s: comparing checksums.
    """

    version: str
    digest: str = ""
    verified_by: Literal["", "engines", "receivers", "files"] = ""
    density: float | None = None
    write_s: float = 0.0
    num_buckets: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    pause_s: float = 0.0
    gather_s: float = 0.0
    send_s: float = 0.0
    load_s: float = 0.0
    verify_s: float = 0.0
    resume_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All of it."""
        sending = self.gather_s + self.send_s + self.load_s + self.verify_s
        return self.write_s + self.pause_s + sending + self.resume_s

    def metrics(self) -> dict[str, float]:
        """The report as `perf/update_weights_*` metrics."""
        metrics = {
            "perf/update_weights_time": self.total_s,
            "perf/update_weights_pause_time": self.pause_s,
            "perf/update_weights_gather_time": self.gather_s,
            "perf/update_weights_send_time": self.send_s,
            "perf/update_weights_load_time": self.load_s,
            "perf/update_weights_verify_time": self.verify_s,
            "perf/update_weights_resume_time": self.resume_s,
            "perf/update_weights_wire_bytes": float(self.num_bytes),
        }
        if self.write_s:
            metrics["perf/update_weights_write_time"] = self.write_s
        if self.density is not None:
            metrics["perf/update_weights_density"] = self.density
        return metrics


def sync_weights(
    named: Iterable[tuple[str, Tensor]],
    *,
    control: Pausable,
    transport: WeightTransport,
    version: str,
    bucket_bytes: int,
    verify: bool,
    pause_mode: PauseMode = PauseMode.RETRACT,
    agree: Callable[[], None] = lambda: None,
) -> SyncReport:
    """Give every engine the trainer's weights; called on the one sending rank.

    When anything fails the engines stay paused, because weights half old and half new must not
    answer.

    Args:
        named: (Hugging Face name, whole tensor) of every parameter.
        verify: compare checksums of what each engine holds with the trainer's tensors.
        pause_mode: with `retract` running requests go on afterwards with the new weights.
        agree: called when all went well so far, before the engines go on; raises when other
            senders had worse luck.

    Raises:
        WeightSyncError: an engine refused a tensor, or holds other values than it was sent; names
            the tensor.
    """
    report = SyncReport(version)
    clock = Laps()
    pipe = _Pipe(control, transport, clock, report, verify=verify)
    control.pause(pause_mode.value)
    report.pause_s = clock.lap("pause")
    for bucket, is_last in mark_last(make_buckets(named, bucket_bytes)):
        report.gather_s += clock.lap("gather")
        pipe.put(bucket, version if is_last else None)
    pipe.drain()
    agree()
    transport.finish(version)
    control.resume()
    report.resume_s = clock.lap("resume")
    if verify:
        report.digest = weights_digest(pipe.sums)
        report.verified_by = "engines"
    return report


@dataclass
class _Pipe:
    """Buckets on their way to the engines.

    Attributes:
        sums: of all tensors that every engine was seen to hold.
    """

    control: Pausable
    transport: WeightTransport
    clock: "Laps"
    report: SyncReport
    verify: bool
    sums: dict[str, int] = field(default_factory=dict[str, int])
    _on_way: "deque[tuple[tuple[str, ...], Sums | None]]" = field(default_factory=deque)

    def put(self, bucket: Bucket, version: str | None) -> None:
        """Send one, when there is room for it."""
        report, clock = self.report, self.clock
        while len(self._on_way) >= self.transport.depth:
            self._take()
        self.transport.start(bucket, version)
        report.send_s += clock.lap("send")
        # Not their numbers yet: a card computes them while the engines load.
        own = start_strip_checksums(bucket.strips) if self.verify else None
        report.verify_s += clock.lap("verify")
        self._on_way.append((bucket.names, own))
        report.num_buckets += 1
        report.num_tensors += len(bucket.names)
        report.num_bytes += bucket.num_bytes

    def drain(self) -> None:
        """Wait for all of them."""
        while self._on_way:
            self._take()

    def _take(self) -> None:
        urls = self.control.urls
        with waiting(", ".join(urls), "take weights", deadline_s=self.control.timeout_s):
            engine_sums = self.transport.taken()
        self.report.load_s += self.clock.lap("load")
        names, own = self._on_way.popleft()
        if own is not None:
            sent = dict(zip(names, own.numbers(), strict=True))
            verify_sums(sent, engine_sums, urls)
            self.sums |= sent
            self.report.verify_s += self.clock.lap("verify")


def verify_sums(
    sent: Mapping[str, int], engine_sums: Sequence[Mapping[str, int]], urls: Sequence[str]
) -> None:
    """Compare checksums of what each engine loaded with those of what was sent.

    Raises:
        WeightSyncError: names the engine and the first tensor that is missing or differs.
    """
    for url, found in zip(urls, engine_sums, strict=True):
        if found == sent:
            continue
        for name, expected in sent.items():
            if found.get(name) != expected:
                state = (
                    "is missing there"
                    if name not in found
                    else f"has checksum {found[name]}, sent {expected}"
                )
                raise WeightSyncError(
                    f"{url} does not hold the weights it was sent: {name} {state}. The engines stay paused; restart "
                    "the run from its last checkpoint, and report this with the engine's log."
                )


def weights_digest(checksums: Mapping[str, int]) -> str:
    """One digest of the checksums of all parameters by name."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(checksums.items()))
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


class Laps:
    """Seconds since the previous lap, each lap a span of the timeline."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self, name: str) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        end = time.time()
        add_span(name, end - elapsed, end)
        return elapsed
