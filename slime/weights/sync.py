"""One weight sync: pause, send in buckets, verify, stamp the version, resume."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from slime.engines.checksum import checksum
from slime.engines.control import EngineControl
from slime.errors import WeightSyncError
from slime.weights.buckets import make_buckets
from slime.weights.transport import Bucket, WeightTransport


@dataclass
class SyncReport:
    """What a sync did and where its time went, seconds."""

    version: str
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
    control: EngineControl,
    transport: WeightTransport,
    version: str,
    bucket_bytes: int,
    verify: bool,
) -> SyncReport:
    """Give every engine the trainer's weights; called on the one sending rank.

    Generation pauses with mode `retract`: running requests go on afterwards with the new weights.
    When anything fails the engines stay paused, because weights half old and half new must not
    answer.

    Args:
        named: (Hugging Face name, whole tensor) of every parameter.
        verify: compare checksums of what each engine holds with the trainer's tensors.

    Raises:
        WeightSyncError: an engine refused a tensor, or holds other values than it was sent; names
            the tensor.
    """
    report = SyncReport(version)
    clock = _Laps()
    control.pause("retract")
    report.pause_s = clock.lap()
    for bucket in make_buckets(named, bucket_bytes):
        engine_sums = transport.send(bucket)
        report.send_s += clock.lap()
        if verify:
            verify_bucket(bucket, engine_sums, control.urls)
            report.verify_s += clock.lap()
        report.num_buckets += 1
        report.num_tensors += len(bucket.names)
        report.num_bytes += bucket.num_bytes
    transport.commit(version)
    control.resume()
    report.resume_s = clock.lap()
    return report


def verify_bucket(
    bucket: Bucket, engine_sums: Sequence[Mapping[str, int]], urls: Sequence[str]
) -> None:
    """Compare what each engine holds after loading `bucket` with what was sent.

    Raises:
        WeightSyncError: names the engine and the first tensor that is missing or differs.
    """
    sent = {
        name: checksum(tensor) for name, tensor in zip(bucket.names, bucket.tensors, strict=True)
    }
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


class _Laps:
    """Seconds since the previous lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed
