"""One weight sync: pause, send in buckets (the last one with the version), verify, resume."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from slime.engines.checksum import checksums
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
    """What a sync did and where its time went, seconds.

    Attributes:
        digest: of every bit of the weights, whatever order and buckets they came in; empty when
            the sync was not verified.
    """

    version: str
    digest: str = ""
    num_buckets: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    pause_s: float = 0.0
    send_s: float = 0.0
    verify_s: float = 0.0
    resume_s: float = 0.0

    def metrics(self) -> dict[str, float]:
        """The report as `perf/update_weights_*` metrics."""
        return {
            "perf/update_weights_time": self.pause_s + self.send_s + self.verify_s + self.resume_s,
            "perf/update_weights_pause_time": self.pause_s,
            "perf/update_weights_send_time": self.send_s,
            "perf/update_weights_verify_time": self.verify_s,
            "perf/update_weights_resume_time": self.resume_s,
            "perf/update_weights_wire_bytes": float(self.num_bytes),
        }


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
    clock = _Laps()
    sums: dict[str, int] = {}
    control.pause(pause_mode.value)
    report.pause_s = clock.lap("pause")
    for bucket, is_last in mark_last(make_buckets(named, bucket_bytes)):
        with waiting(", ".join(control.urls), "take weights", deadline_s=control.timeout_s):
            engine_sums = transport.send(bucket, version if is_last else None)
        report.send_s += clock.lap("send")
        if verify:
            sums |= verify_bucket(bucket, engine_sums, control.urls)
            report.verify_s += clock.lap("verify")
        report.num_buckets += 1
        report.num_tensors += len(bucket.names)
        report.num_bytes += bucket.num_bytes
    agree()
    transport.finish(version)
    control.resume()
    report.resume_s = clock.lap("resume")
    if verify:
        report.digest = weights_digest(sums)
    return report


def verify_bucket(
    bucket: Bucket, engine_sums: Sequence[Mapping[str, int]], urls: Sequence[str]
) -> dict[str, int]:
    """Compare what each engine holds after loading `bucket` with what was sent; those checksums.

    Raises:
        WeightSyncError: names the engine and the first tensor that is missing or differs.
    """
    sent = dict(zip(bucket.names, checksums(bucket.tensors), strict=True))
    for url, found in zip(urls, engine_sums, strict=True):
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
    return sent


def weights_digest(checksums: Mapping[str, int]) -> str:
    """One digest of the checksums of all parameters by name."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(checksums.items()))
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


class _Laps:
    """Seconds since the previous lap, each lap a span of the timeline."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self, name: str) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        end = time.time()
        add_span(name, end - elapsed, end)
        return elapsed
